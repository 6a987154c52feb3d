"""Every kernel variant once, on shapes small enough for compute-sanitizer, values checked:

compute-sanitizer --tool memcheck python tests/gpu_sanitizer.py [cuda] [triton]
"""

import sys
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, not as a module of tests

from kexue_kernels import backends
from tests.monarch import cases as monarch
from tests.scan.cases import (
    DTYPES,
    Case,
    error,
    make,
    packed,
    plain,
    run,
    widened,
)


def linear_scan_cases() -> list[Case]:
    """By vectors and by elements, one tile and chains of tiles, each kind of a, both ways."""
    cases = [
        Case(B=2, L=L, D=D, dtype=dtype, a=a, reverse=reverse)
        for dtype, (D, a), (L, reverse) in product(
            DTYPES, ((40, "full"), (5, "channel")), ((20, False), (300, True))
        )
    ]
    cases += [packed((270, 0, 1, 40), D=16, dtype=dtype) for dtype in DTYPES]
    return [
        *cases,
        packed((3, 0, 300), D=5, a="channel", reverse=True, initial=None),
        Case(B=1, L=300, D=8, a="step"),
        Case(B=2, L=40, D=8, strided=True),
    ]


def check(case: Case, backend: str) -> None:
    """As tests.scan.cases.check, all but the kernels on CPU: sanitizers slow every launch."""
    inputs = make(case)
    exact = run(case, widened(inputs), "reference")
    own = run(case, inputs, "reference")
    if case.dtype in (torch.bfloat16, torch.float16):
        own["grad_a"] = plain(case, inputs)["grad_a"]
    for name, value in run(case, make(case, "cuda"), backend).items():
        eps = torch.finfo(value.dtype).eps
        allowed = 2 * error(own[name], exact[name]) + 4 * eps * exact[name].abs().max().item()
        found = error(value.cpu(), exact[name])
        assert found <= allowed, (backend, case, name, found, allowed)


def hopper_products() -> list[monarch.Case]:
    """Factors that stay in a cluster's shared memory, and factors that are streamed."""
    if torch.cuda.get_device_capability() != (9, 0):
        return []
    sizes = [
        {"k": 16, "q": 32, "p": 64, "l": 16, "s": 8, "N": 70},
        {"k": 64, "q": 128, "p": 64, "l": 128, "s": 64, "N": 90},
    ]
    halves = (torch.bfloat16, torch.float16)
    return [monarch.Case(**size, dtype=dtype) for size, dtype in product(sizes, halves)]


def check_product(case: monarch.Case) -> None:
    inputs, _ = monarch.make(case)
    exact = case.call({name: x.double() for name, x in inputs.items()}, "reference")
    own = case.call(inputs, "reference")
    found = case.call({name: x.cuda() for name, x in inputs.items()}, "cuda")
    monarch.check_close("y", found.cpu(), own, exact)


def main(names: list[str]) -> None:
    for backend in names or ["cuda", "triton"]:
        status = backends()[backend]
        if not status.available:
            sys.exit(f"{backend}: {status.reason}")
        for case in linear_scan_cases():
            check(case, backend)
            print(f"linear_scan {backend} {case}: ok", flush=True)
        for product_case in hopper_products() if backend == "cuda" else []:
            check_product(product_case)
            print(f"monarch_matmul {backend} {product_case}: ok", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
