"""lit_diffusion: score-based and diffusion generative models on one backbone, one data pipeline and one evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_diffusion.checkpoints import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: `import lit_diffusion` and `python -m lit_diffusion --help` stay free of torch.
    if name == "load":
        from lit_diffusion.checkpoints import load

        return load
    raise AttributeError(f"module 'lit_diffusion' has no attribute {name!r}")
