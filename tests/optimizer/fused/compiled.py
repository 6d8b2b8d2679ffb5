"""Compile the kernel for a GPU that need not be there, in every form that a step asks for.

Triton's interpreter takes kernels that its compiler refuses. Prints a line for each.
"""

from __future__ import annotations

import sys

from torch_simu.optimizer.stepping.kernel import advance

NUMBERS = ("keep", "weight_decay", "share", "rho", "eps", "clip")
SIZES = ("num_rows", "num_columns", "row_stride", "column_stride")
FORMS = (
    {"weight": "fp32", "state": "fp32", "SELECTS_ROWS": False, "DECAYS": False, "LR_IS_POINTER": False},
    {"weight": "bf16", "state": "bf16", "SELECTS_ROWS": True, "DECAYS": True, "LR_IS_POINTER": True},
    {"weight": "fp16", "state": "fp32", "SELECTS_ROWS": False, "DECAYS": True, "LR_IS_POINTER": False},
)


def compiled(form: dict[str, object], absent: tuple[str, ...], ones: tuple[str, ...]) -> str:
    """The instructions for the device."""
    # Here, because every file is imported where doctests are looked for, with Triton or without.
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = triton.jit(advance)
    constants: dict[str, object] = {key: value for key, value in form.items() if key.isupper()}
    constants |= {"BLOCK_ROWS": 8, "BLOCK_COLUMNS": 128, **dict.fromkeys(absent), **dict.fromkeys(ones, 1)}
    types = {"weight": f"*{form['weight']}", "exp_avg": f"*{form['state']}", "hessian": f"*{form['state']}"}
    types |= {"grad": "*fp32", "step": "*fp32", "indices": "*i64", "finite": "*u8"}
    types |= {"lr": "*fp32" if form["LR_IS_POINTER"] else "fp32", **dict.fromkeys(NUMBERS, "fp32")}
    types |= dict.fromkeys(SIZES, "i32") | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, constants)
    return triton.compile(source, GPUTarget("cuda", 80, 32), {"enable_fp_fusion": False}).asm["ptx"]


def main() -> None:
    # A number that is one is a constant to Triton.
    ones = (("column_stride",), (*SIZES[:2], "row_stride"), SIZES)
    for form, (absent, one) in zip(
        FORMS, zip(((), ("finite",), ("indices", "finite")), ones, strict=True), strict=True
    ):
        text = compiled(form, absent, one)
        # Multiplications and sums round one by one, and so do quotients, as in the eager step.
        assert "fma." not in text and "div.rn.f32" in text
        sys.stdout.write(f"{form} {absent} {one}\n")


if __name__ == "__main__":
    main()
