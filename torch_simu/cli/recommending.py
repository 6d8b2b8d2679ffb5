"""recommend_job: what the command does, from files to a recommendation."""

from __future__ import annotations

from torch_simu._checks import check_number, problem
from torch_simu.cli.loading import Loading
from torch_simu.cli.measuring import Show, Sources, read_sets, show_first
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.data.examples import encode
from torch_simu.unlearning.data.tokenizer import pad_id
from torch_simu.unlearning.pilot.pilot import recommend
from torch_simu.unlearning.pilot.recommendation import Recommendation
from torch_simu.unlearning.progress import Progress


def recommend_job(
    model: str,
    sets: Sources,
    config: UnlearnConfig,
    *,
    minutes: float = 10.0,
    loading: Loading | None = None,
    max_length: int | None = None,
    progress: Progress | None = None,
    show: Show | None = None,
) -> tuple[Recommendation, dict[str, str]]:
    """Try several choices on a model in memory; nothing is written.

    Args:
        model: Folder of the model and its tokenizer.
        sets: "forget" and "retain" -> their rows.
        config: What the pilot starts from.
        minutes: Wall time of the pilot, after the model is loaded.
        loading: How the model is loaded.
        max_length: Largest number of tokens of prompt and answer.
        progress: Told of a stage for each try.
        show: Told the first row to forget, as the model reads it.

    Returns:
        The recommendation, and the options beside it that a command must have: how the model was loaded and cut.

    Raises:
        ValueError: If a file, a row or an option is wrong, or the pilot refuses them.
        OSError: If a file cannot be read.
    """
    check_number("minutes", minutes, low_open=True)
    loading = loading or Loading()
    if loading.load_in is not None and not config.trains_neurons:
        wrong = f"Method {config.method!r} trains whole weights, and load_in is {loading.load_in!r}"
        raise ValueError(problem(wrong, "a method that trains neurons", "Or leave the model unquantized."))
    rows = read_sets(sets)
    net, tokenizer = loading.load(model, float_attention=config.attention == "full")
    show_first(rows, tokenizer, max_length, show)
    examples = {name: encode(part, tokenizer, max_length=max_length) for name, part in rows.items()}
    found = recommend(
        net,
        examples["forget"],
        examples["retain"],
        minutes=minutes,
        config=config,
        pad_id=pad_id(tokenizer, net),
        progress=progress,
    )
    usual = Loading()
    given = {"max-length": (max_length, None)} | {
        name.replace("_", "-"): (getattr(loading, name), getattr(usual, name))
        for name in ("dtype", "load_in", "device")
    }
    return found, {name: str(value) for name, (value, left_out) in given.items() if value != left_out}
