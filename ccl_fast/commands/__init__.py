"""The commands of ``ccl-fast`` as functions. They need the packages of ``ccl-fast[train]``."""

from typing import TYPE_CHECKING

from ccl_fast.errors import packages_of_training
from ccl_fast.later import imported_later

if TYPE_CHECKING:
    from ccl_fast.commands.compare_objectives import compare
    from ccl_fast.commands.embed_images import embed
    from ccl_fast.commands.evaluate_run import evaluate
    from ccl_fast.commands.export_model import export
    from ccl_fast.commands.predictor import Predictor, load_run
    from ccl_fast.commands.score_images import score
    from ccl_fast.commands.train_models import train

# Imported when they are used: the help of one command waits for no other.
_LATER = {
    "Predictor": "predictor",
    "compare": "compare_objectives",
    "embed": "embed_images",
    "evaluate": "evaluate_run",
    "export": "export_model",
    "load_run": "predictor",
    "score": "score_images",
    "train": "train_models",
}

__all__ = ["Predictor", "compare", "embed", "evaluate", "export", "load_run", "score", "train"]


def __getattr__(name: str):
    with packages_of_training():
        return imported_later(__name__, _LATER, name)


def __dir__() -> list[str]:
    return sorted(__all__)
