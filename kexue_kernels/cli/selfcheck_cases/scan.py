"""The scan family's cases for `selfcheck`."""

from kexue_kernels.cli.selfcheck_cases import linear_scan, selective_scan, selective_state_update

CASES = [*linear_scan.CASES, *selective_scan.CASES, *selective_state_update.CASES]
