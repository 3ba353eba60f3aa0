"""Runs that nobody trained, for tests of studies."""

from examples.common import runs


def train(benchmark, model_dir, *arguments):
    """Returns a run of four rows, like `runs.train`."""
    flags = dict(flag.removeprefix("--").split("=") for flag in arguments)
    algorithm = flags["algorithm"]
    is_bleu = benchmark == "transformer"
    result = {
        "algorithm": algorithm,
        "scale": flags.get("elastic") or int(flags["scale"]),
        "iterations": int(flags.get("iterations", 40)),
        "examples": 640,
        "metric": "bleu" if is_bleu else "accuracy",
        "value": 97.5 if is_bleu else 0.975,
        "mean_gain": 3.5 if algorithm in ("adascale", "adamscale") else None,
    }
    log = {
        "step": [10.0, 20.0, 30.0, 40.0],
        "base_batches": [40.0, 80.0, 120.0, 160.0],
        "scale_invariant_step": [30.0, 60.0, 90.0, 120.0],
        "gain": [3.0, 3.0, 3.0, 3.0],
        "scale": [4.0, 4.0, 4.0, 4.0],
        "loss": [2.0, 1.0, 0.5, 0.25],
        "effective_learning_rate": [0.4, 0.3, 0.2, 0.1],
    }
    return runs.Run(result, log)
