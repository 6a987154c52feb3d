"""selective_state_update on GPUs with Triton: one step of the selective scan, for generation."""

import triton
from torch import Tensor

from kexue_kernels.offline import TritonCase
from kexue_kernels.scan.triton_selective_state_update_kernel import selective_state_update_kernel
from kexue_kernels.triton_common import launching_on

NUM_STAGES = 1


def configure(P: int, n: int) -> tuple[int, int, int]:
    """N, BLOCK_P and num_warps: some 8 states to a thread, so that all loads are in flight at
    once, and blocks of at most 4 warps."""
    N = triton.next_power_of_2(n)
    BLOCK_P = min(triton.next_power_of_2(P), max(1, 1024 // N))
    return N, BLOCK_P, max(1, min(4, N * BLOCK_P // 256))


def update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
    out: Tensor,
) -> None:
    batch, H, P = x.shape
    n = state.shape[3]
    N, BLOCK_P, num_warps = configure(P, n)
    blocks = triton.cdiv(P, BLOCK_P)
    with launching_on(x):
        selective_state_update_kernel[(blocks * H * batch,)](
            state,
            x,
            dt,
            A,
            B,
            C,
            D,
            z,
            dt_bias,
            state_batch_indices,
            out,
            state.shape[0],
            H,
            P,
            n,
            B.shape[1],
            *state.stride(),
            *x.stride(),
            *dt.stride(),
            *(z.stride() if z is not None else (0, 0, 0)),
            *A.stride(),
            *B.stride(),
            *C.stride(),
            *(D.stride() if D is not None else (0, 0)),
            *(dt_bias.stride() if dt_bias is not None else (0, 0)),
            SOFTPLUS=dt_softplus,
            N=N,
            BLOCK_P=BLOCK_P,
            num_warps=num_warps,
            num_stages=NUM_STAGES,
        )


# ---- what is compiled offline


def compile_cases() -> list[TritonCase]:
    return [
        _case("bf16", "fp32", 128, True),
        _case("fp32", "fp32", 16, True),
        _case("bf16", "bf16", 16, False),
    ]


def _case(data: str, state: str, n: int, options: bool) -> TritonCase:
    """Heads of 64 channels, n states each; with all options, dt and A tied within a head."""
    N, BLOCK_P, num_warps = configure(64, n)
    given = {"D_ptr": "*fp32", "z_ptr": f"*{data}", "bias_ptr": "*fp32", "index_ptr": "*i64"}
    strides = {
        "state": ("row", "head", "channel", "n"),
        **dict.fromkeys(("x", "dt", "z"), ("row", "head", "channel")),
        "A": ("head", "channel", "n"),
        **dict.fromkeys("BC", ("row", "group", "n")),
        **dict.fromkeys(("D", "bias"), ("head", "channel")),
    }
    arguments: dict[str, object] = {"state_ptr": f"*{state}"}
    arguments |= {f"{name}_ptr": f"*{data}" for name in ("x", "dt")}
    arguments |= {"A_ptr": "*fp32", "B_ptr": f"*{data}", "C_ptr": f"*{data}"}
    arguments |= {name: kind if options else None for name, kind in given.items()}
    arguments |= {"out_ptr": f"*{data}"}
    arguments |= dict.fromkeys(("rows", "H", "P", "n", "groups"), "i32")
    for name, axes in strides.items():
        arguments |= {f"{name}_{axis}": "i32" for axis in axes}
        arguments[f"{name}_{axes[-1]}"] = 1
    arguments |= {"SOFTPLUS": options, "N": N, "BLOCK_P": BLOCK_P}
    types = {k: t for k, t in arguments.items() if isinstance(t, str)}
    sizes = {"fp32": 4, "bf16": 2}
    return TritonCase(
        op="selective_state_update",
        name=f"{data}-state_{state}-n{n}" + "-plain" * (not options),
        kernel=f"{__name__}_kernel:selective_state_update_kernel",
        signature={k: types.get(k, "constexpr") for k in arguments},
        constexprs={k: value for k, value in arguments.items() if k not in types},
        num_warps=num_warps,
        num_stages=NUM_STAGES,
        bytes_per_element=2 * sizes[state],
        flops_per_element=7,
        divisible_by_16=tuple(
            k for k, t in types.items() if t[0] == "*" or k in ("P", "n") or "_" in k
        ),
    )
