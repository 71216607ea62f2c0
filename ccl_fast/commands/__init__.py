"""The commands of ``ccl-fast`` as functions. They need the packages of ``ccl-fast[train]``."""

from ccl_fast.errors import packages_of_training

with packages_of_training():
    from ccl_fast.commands.compare_objectives import compare
    from ccl_fast.commands.embed_images import embed
    from ccl_fast.commands.evaluate_run import evaluate
    from ccl_fast.commands.export_model import export
    from ccl_fast.commands.predictor import Predictor, load_run
    from ccl_fast.commands.score_images import score
    from ccl_fast.commands.train_models import train

__all__ = ["Predictor", "compare", "embed", "evaluate", "export", "load_run", "score", "train"]
