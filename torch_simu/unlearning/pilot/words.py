"""Words: a configuration as the options of the command line, and back in nothing but them."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping

from torch_simu._checks import problem
from torch_simu.unlearning.config import UnlearnConfig

_SIZES = ("forget_batch_size", "retain_batch_size", "hessian_batch_size", "eval_batch_size")

AS_GIVEN = "as given"
"""The name of the try that changes nothing."""

_WITHOUT = ("attribution_method", "eval_interval", "eval_rows", "monitor_interval")
"""The choices that the command line has no option for."""

_USUAL = 16
"""The one batch size of a run from the command line."""


def one_batch_size(config: UnlearnConfig, size: int = _USUAL) -> UnlearnConfig:
    """Return a copy whose four batch sizes are one, as the command line has it.

    Examples:
        >>> one_batch_size(UnlearnConfig(), 8).eval_batch_size
        8
    """
    return config.updated(**dict.fromkeys(_SIZES, size))


def options_of(config: UnlearnConfig, beside: UnlearnConfig | None = None) -> list[str]:
    """Return the options of `torch-simu unlearn` that make a configuration, as words.

    Args:
        config: The configuration.
        beside: What holds without an option; None: the defaults of the command.

    Raises:
        ValueError: If the command line has no option for a choice, four different batch sizes say.

    Examples:
        >>> options_of(one_batch_size(UnlearnConfig(lr=0.16, paced=False)))
        ['--lr', '0.16', '--no-paced']
    """
    # Of the same method: what is left open is that method's own.
    usual = one_batch_size(UnlearnConfig(method=config.method)) if beside is None else beside
    words = []
    if config.method != (UnlearnConfig() if beside is None else beside).method:
        words += ["--method", config.method]
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if name == "method" or value == getattr(usual, name):
            continue
        # None of a choice that has another value without its option cannot be written.
        if name in _WITHOUT or value is None:
            raise ValueError(problem(f"{name} is {value!r}", repr(getattr(usual, name)), "It has no option."))
        if name in _SIZES:
            if len({getattr(config, each) for each in _SIZES}) > 1:
                sizes = {each: getattr(config, each) for each in _SIZES}
                raise ValueError(problem(f"The batch sizes are {sizes}", "one for all", "They have one option."))
            name = "batch_size"
        option = f"--{name.replace('_', '-')}"
        if option in words:
            continue
        if isinstance(value, bool):
            words.append(option if value else f"--no-{name}")
        else:
            words += [option, _written(value)]
    return words


def as_changed(config: UnlearnConfig, given: UnlearnConfig) -> str:
    """Return what a configuration changes of another one, as options; "as given" where it changes nothing.

    Examples:
        >>> as_changed(UnlearnConfig(lr=0.01), UnlearnConfig())
        '--lr 0.01'
    """
    return shlex.join(options_of(config, beside=given)) or AS_GIVEN


def command_line(words: Mapping[str, str], config: UnlearnConfig) -> str:
    """Return a call of `torch-simu unlearn` as a shell takes it.

    Args:
        words: Name of an option -> its value, `{"load-in": "8bit"}` say, which stand before those of `config`.
        config: Every choice of the run.

    Raises:
        ValueError: If the command line has no option for a choice.

    Examples:
        >>> command_line({"model": "my model"}, one_batch_size(UnlearnConfig(seed=1)))
        "torch-simu unlearn --model 'my model' --seed 1"
    """
    given = [word for name, value in words.items() for word in (f"--{name}", value)]
    return shlex.join(["torch-simu", "unlearn", *given, *options_of(config)])


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(repr, value))
    return value if isinstance(value, str) else repr(value)
