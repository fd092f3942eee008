"""Whether the optional grouped_gemm package is installed; grouped experts run without it as well."""

from __future__ import annotations

from megatron.core.kernels import capability


def grouped_gemm_is_available() -> bool:
    """True if the package can be imported."""
    return "grouped_gemm" in capability.probe().packages


def assert_grouped_gemm_is_available() -> None:
    """AssertionError with the way out if the package is missing."""
    assert grouped_gemm_is_available(), (
        "grouped_gemm is not installed: pip install grouped_gemm, or run the experts with torch's matrix products, "
        "which need nothing"
    )
