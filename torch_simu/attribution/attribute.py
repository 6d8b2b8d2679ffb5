"""attribute_neurons: which neurons the predictions of some samples rest on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_simu._checks import check_choice, check_number, problem
from torch_simu.attribution.attribution import Attribution
from torch_simu.attribution.checkpoint import Checkpoint, Partial, config_hash, weights_hash
from torch_simu.attribution.completeness import IncompleteError, check_complete, warn_incomplete
from torch_simu.attribution.estimate.limit import Limit
from torch_simu.attribution.estimate.result import attribution_of
from torch_simu.attribution.estimate.within import Within
from torch_simu.attribution.experts import check_linear
from torch_simu.attribution.frozen import frozen
from torch_simu.attribution.methods.call import device_of
from torch_simu.attribution.methods.decode import decode_rows, decode_sums
from torch_simu.attribution.methods.layerwise import joint_sums, layerwise_sums
from torch_simu.attribution.methods.memory import Memory, check_memory, limit_of
from torch_simu.attribution.methods.packed.growing import blocks_of
from torch_simu.attribution.methods.packed.sums import packed_rows, packed_sums
from torch_simu.attribution.methods.prefix import prefix_rows, prefix_sums
from torch_simu.attribution.methods.rows import RowsOf
from torch_simu.attribution.methods.spot_check import check_exact, fastest_exact
from torch_simu.attribution.methods.sums import LayerSum, Method
from torch_simu.attribution.path import Objective, Path, Rule
from torch_simu.attribution.positions import fresh_positions
from torch_simu.attribution.sequences import ScoredSequence, collect_sequences, data_hash
from torch_simu.attribution.sharing import added_up, share_of
from torch_simu.layers import Selector, check_kind, check_loaded, num_neurons, select_layers

MethodName = Literal["auto", "packed", "decode", "prefix", "layerwise", "joint"]
"""How to attribute: the first three after "auto" are exact, the last two approximate, "auto" is the best exact one."""

_METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "packed": packed_sums,
        "decode": decode_sums,
        "prefix": prefix_sums,
        "layerwise": layerwise_sums,
        "joint": joint_sums,
    }
)
_ROWS: Mapping[str, RowsOf] = MappingProxyType({"packed": packed_rows, "decode": decode_rows, "prefix": prefix_rows})
_FAST = ("packed", "decode")

# Short sequences share a pass up to this many tokens: beyond, attention between sequences costs more than a pass saves.
_PACK_TOKENS = 128
# A pass of an estimate has one stream instead of one for each path point, and should not wait for weights.
_ESTIMATE_TOKENS = 1024


def attribute_neurons(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    select: Selector | None = None,
    objective: Objective = "logprob",
    steps: int = 10,
    rule: Rule = "midpoint",
    method: MethodName = "auto",
    resume: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    max_completeness_error: float | None = 0.2,
    group: dist.ProcessGroup | None = None,
    budget: int | timedelta | None = None,
    generator: torch.Generator | None = None,
    memory: float | None = None,
) -> Attribution:
    r"""Attribute next-token predictions to the neurons of each layer, exactly and completely.

    One sample $i$ is a scored label and the prefix before it. Only one layer is changed, at the last position of the
    prefix, whose clean activation is $\beta_i$; the score of neuron $k$ is (SIMU, arXiv 2510.07822; Dai et al. 2022)

    $$\mathrm{Att}_k = \frac1m \sum_j \sum_i \beta_{ik}
    \left.\frac{\partial F_i}{\partial a_k}\right|_{a=\alpha_j\beta_i}, \qquad
    \sum_k \mathrm{Att}_k = \sum_i F_i(\beta_i) - F_i(0) + \delta,$$

    with the quadrature error $\delta$ reported as `completeness_error`. Parameters, gradients, modes and hooks of the
    model are left as they are, also after an exception.

    Args:
        model: A causal language model; it is evaluated without dropout, on its own device.
        batches: Mappings with `input_ids`, `labels` (-100 = not scored; `labels[t]` is predicted from the tokens before
            `t`, as in transformers) and perhaps `attention_mask`. Shape of each: `(batch, length)`. Padding may be on
            either side; each sequence counts as if it stood alone. Other keys are ignored.
        select: Layers, as in `torch_simu.layers.select_layers`; None: the MLP down projections.
        objective: $F$: log-likelihood of the target ("logprob"), its probability ("prob") or its negative
            log-likelihood ("loss").
        steps: Number $m$ of path points.
        rule: Path points $\alpha_j$: those of Gauss and Legendre, each with its weight ("gauss"), $(j - 1/2)/m$
            ("midpoint"), $j/m$ ("right", as in the paper) or $(j-1)/m$ ("left").
        method: "prefix" runs one pass per prefix; "packed" many samples in one pass, over cached keys and values;
            "decode" each sample as one token behind its cached prefix, as in generation; "auto" is the first of
            "packed" and "decode" that a spot check finds equal to "prefix", else "prefix" with a warning; where one of
            them is asked for, the same check refuses it. "layerwise"
            and "joint" are rough: they change all positions, or all positions and layers, at once.
        resume: A file for partial sums, written every ten seconds and when an exception interrupts. A call with the
            same arguments goes on from there; the file is deleted when the result is complete.
        progress: Called with (done, total), counted in samples times layers; with `group`, in those of this process.
        max_completeness_error: The largest `Attribution.incompleteness` of a layer that is not refused; from 0.01 on it
            is worth a warning. None: whatever it is, without a warning.
        group: Processes that share the samples, each with the whole model and all batches; every one gets the sums over
            all. `resume` must name a file for each. None: this process attributes everything.
        budget: What it may cost: a number of passes over all samples, each forward and backward, or a time, after which
            every sample has had two passes at least. Exact sums over $L$ layers count as $L$ passes for each path point
            and for the path's end at zero; as $(L + 1) / 2$ with "packed", which runs nothing below a layer. Scores are
            exact but for the quadrature with as many of `steps` as fit; where no more than one fits, without the end
            and completeness. Where none does, they are an unbiased estimate, with `Attribution.standard_error` and
            without completeness: in each pass a sample changes one random layer to one random point. None: all `steps`.
        generator: Source of randomness of an estimate, on the CPU; None: always the same.
        memory: What one pass may take: bytes, or below 1 a share of an accelerator's free memory, elsewhere of 4 GiB.
            What a token takes is measured first, and then as many layers, path points and samples share a pass as fit.
            None: a quarter.

    Returns:
        Scores of every neuron, `completeness_error` of every layer, and provenance.

    Raises:
        IncompleteError: If a layer's scores miss more than `max_completeness_error` of the change that they explain.
        ValueError: If there is no batch or no scored label, a batch is malformed, an option is unknown, the method
            cannot be exact on this model, `resume` holds another attribution, the processes of `group` were given
            different things, a layer has no data, or all are offloaded.
        TypeError: If a batch is no mapping of whole-number tensors, or a layer is of a kind without neurons.
        KeyError: If a batch lacks `input_ids` or `labels`, or a selected layer does not exist.

    Warns:
        UserWarning: If "auto" has to take "prefix", or a layer's scores miss more than 1 %.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        ...                      num_attention_heads=2, pad_token_id=0)
        >>> model = LlamaForCausalLM(config)
        >>> ids = torch.tensor([[3, 1, 4, 1, 5]])
        >>> attribution = attribute_neurons(model, [{"input_ids": ids, "labels": ids}])
        >>> attribution
        Attribution(2 layers, 24 neurons, 4 samples, 0.0% incomplete at most)
        >>> attribution.top(0.25).num_selected
        6
    """
    path = Path(objective, rule, steps)
    if max_completeness_error is not None:
        check_number("max_completeness_error", max_completeness_error)
    check_choice("method", method, ("auto", *_METHODS))
    check_memory(memory)
    limit, seed = None if budget is None else Limit(budget), _seed(generator)
    if limit is not None and method not in ("auto", *_ROWS):
        wrong = f"budget is given with method {method!r}, which changes all positions at once"
        raise ValueError(problem(wrong, f"'auto' or one of {list(_ROWS)}", "Leave the budget out."))
    layers = select_layers(model, select)
    for name, module in layers.items():
        check_kind(name, module)
    check_loaded(model)
    sequences = collect_sequences(batches)
    with frozen(model), fresh_positions(model):
        check_linear(model, sequences[-1].ids[None].to(device_of(model)), layers)
        chosen = _chosen(model, sequences, layers, path, Memory(limit_of(model, memory)), method)
        occupied = Memory.of(model, sequences[-1].ids, memory)
        provenance: dict[str, object] = {
            "objective": objective,
            "rule": rule,
            "steps": steps,
            "method": chosen,
            "model_type": getattr(getattr(model, "config", None), "model_type", type(model).__name__),
            "model": config_hash(model),
            "weights": weights_hash(model),
        }
        if budget is not None:
            provenance |= {"budget": str(budget), "seed": seed}
        configuration = {**provenance, "layers": list(layers)}
        # Compared, and kept out of the provenance: a hash of few possible texts tells which of them it was.
        data = data_hash(sequences)
        mine = sequences
        if group is not None:
            mine = share_of(sequences, repr((configuration, data)), group)
            configuration["share"] = [dist.get_rank(group), dist.get_world_size(group)]
            # Samples of two processes must not change the same layers at the same time.
            seed += dist.get_rank(group)
        checkpoint = Checkpoint(None if resume is None else os.fspath(resume), configuration, data)
        sizes = {name: num_neurons(module) for name, module in layers.items()}
        fresh = Partial({name: LayerSum.zero(size, estimated=limit is not None) for name, size in sizes.items()})
        partial = checkpoint.load(fresh)
        # Streams that begin at the block of a layer make half of a pass on average.
        per_point = (len(layers) + 1) / 2 if chosen == "packed" and blocks_of(model, layers) else len(layers)
        within = Within(model, layers, path, occupied, _METHODS[chosen], _ROWS.get(chosen), per_point, limit, seed)
        try:
            _add_sequences(mine, len(layers), within, partial, checkpoint, progress)
        except BaseException:
            checkpoint.save(partial, now=True)
            raise
    sums = partial.sums if group is None else added_up(partial.sums, group)
    attribution = attribution_of(sums, sum(sequence.num_samples for sequence in sequences), provenance)
    if max_completeness_error is not None:
        try:
            check_complete(attribution, max_completeness_error)
        except IncompleteError:
            # With another bound, the next call has the sums.
            checkpoint.save(partial, now=True)
            raise
        warn_incomplete(attribution)
    checkpoint.remove()
    return attribution


def _seed(generator: torch.Generator | None) -> int:
    return 0 if generator is None else int(torch.randint(2**62, (), generator=generator))


def _chosen(
    model: nn.Module,
    sequences: list[ScoredSequence],
    layers: Mapping[str, nn.Module],
    path: Path,
    memory: Memory,
    method: MethodName,
) -> str:
    """Return the method to take; the fast ones are compared with the definition first, asked for or not."""
    if method == "auto":
        return fastest_exact(model, sequences, layers, path, memory, {name: _METHODS[name] for name in _FAST})
    if method in _FAST:
        check_exact(model, sequences, layers, path, memory, method, _METHODS[method])
    return method


def _add_sequences(
    sequences: list[ScoredSequence],
    num_layers: int,
    within: Within,
    partial: Partial,
    checkpoint: Checkpoint,
    progress: Callable[[int, int], None] | None,
) -> None:
    total = sum(sequence.num_samples for sequence in sequences)
    tokens = _PACK_TOKENS if within.limit is None else _ESTIMATE_TOKENS
    for group in _groups(sequences[partial.num_sequences :], tokens):
        done = sum(sequence.num_samples for sequence in sequences[: partial.num_sequences])
        count = sum(sequence.num_samples for sequence in group)

        def report(share: float, done: int = done, count: int = count) -> None:
            if progress is not None:
                progress(round((done + share * count) * num_layers), total * num_layers)

        found = within.sums(group, share=count / (total - done), number=partial.num_sequences, progress=report)
        # Only whole groups count, so that an interruption leaves sums over the same sequences in every layer.
        partial.sums = {name: each + found[name] for name, each in partial.sums.items()}
        partial.num_sequences += len(group)
        checkpoint.save(partial)


def _groups(sequences: list[ScoredSequence], tokens: int) -> Iterator[list[ScoredSequence]]:
    """Yield the sequences in order, as many at once as share a pass."""
    group: list[ScoredSequence] = []
    for sequence in sequences:
        if group and sum(map(len, group)) + len(sequence) > tokens:
            yield group
            group = []
        group.append(sequence)
    if group:
        yield group
