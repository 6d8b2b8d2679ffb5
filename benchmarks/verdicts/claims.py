"""What the benchmarks claim, each in words that its rows can deny."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from benchmarks.verdicts import forgetting, gpu, job, optimizer, planted, reliability, speed
from benchmarks.verdicts.parts import Part, Row, verdict


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence, and the parts of it that rows can deny."""

    text: str
    parts: Callable[[Sequence[Row]], Iterable[Part]]

    def verdict(self, content: Mapping[str, object]) -> dict[str, object]:
        """What the rows of a result say of the claim; those of hooks stand beside the others."""
        return verdict(self.parts([*content["rows"], *content.get("hooks", ())]))


CLAIMS: Mapping[str, Claim] = MappingProxyType(
    {
        "optimizer_step": Claim(
            "At 5 % of 4 layers of 1024 x 4096 (fp32, one thread): 15 times faster than dense masked Sophia, twice as "
            "fast as fused AdamW; on compact parameters 40 times faster than dense masked Sophia.",
            optimizer.step,
        ),
        "optimizer_memory": Claim(
            "The state of selected neurons takes at most 1.02 times two compact moments in float32.", optimizer.memory
        ),
        "optimizer_whitened": Claim(
            "At 5 % of 24 layers of 1024 x 4096 (fp32, one thread) a step whitened by the covariance of its neurons "
            "costs at most 2 times the diagonal one, best of all repeats in one run.",
            optimizer.whitened,
        ),
        "optimizer_peers": Claim(
            "At 5 % of 4 layers of 1024 x 4096 (fp32, one thread, processor time, all in one run) a step of ours is at "
            "least 5 times faster than dense masked Sophia as SOUL publishes it, 2 times than a lean one, and no "
            "slower than that one compiled or than fused AdamW; on deltas no slower than LoRA's of as many numbers.",
            optimizer.peers,
        ),
        "job": Claim(
            "From the folder of SmolLM2-135M to the saved result, on the same rows and with as many steps, a job of "
            "ours takes at most 1.2 of the processor time of LoRA with AdamW (the faster of two) and at most half of "
            "the peak memory of full fine-tuning with AdamW.",
            job.job,
        ),
        "demo": Claim(
            "At a mean forget probability of at most 0.1, SIMU keeps more of the retain set and of the world facts "
            "(EM) than first- and second-order GradDiff on all weights.",
            forgetting.keeps_more,
        ),
        "demo_tuning": Claim(
            "Step size and curvature scale of each of the demo's published methods are the best of eight by retain EM "
            "at the forget target.",
            forgetting.tuning,
        ),
        "tofu_forget01": Claim(
            "torch-simu unlearn forgets TOFU forget01 in a small model trained on TOFU rows: at a mean forget "
            "probability of at most 0.1, SIMU keeps more of the retain set and of the world facts (EM) than first- "
            "and second-order GradDiff on all weights.",
            forgetting.keeps_more,
        ),
        "directions": Claim(
            "In the leading twentieth of the directions of the forget set's activations lie more than a third of what "
            "relearning changes in the down projections, and more than a third of what steps by the diagonal change, "
            "but less than a tenth of what the default changes.",
            forgetting.directions,
        ),
        "massive": Claim(
            "In some layers of SmolLM2-135M-Instruct one neuron sets the mean of the diagonal of the neurons' "
            "covariance, which is more than a hundred times the mean without the largest fiftieth; that is at most "
            "four times the median in every layer.",
            forgetting.massive,
        ),
        "lasting": Claim(
            "At the forget target the default keeps more than first order, second order and SOUL's steps on all "
            "weights with its objective, and moves the predictions of what is to be kept no farther; it keeps no less "
            "than masks of its size; and relearning brings back at most half of what it brings back after the best of "
            "those three. By the 95 % intervals of the paired differences over seeds.",
            forgetting.lasting,
        ),
        "variants": Claim(
            "No single change of the default lets less come back and keeps at least as many retain and world answers; "
            "several together keep 0.944 of the world answers, as many as first order on all weights, and let at most "
            "0.267 come back, a third of what comes back of the paper's method.",
            forgetting.variants,
        ),
        "recommending": Claim(
            "On three models that it was not tuned on, recommend picks a run that reaches the forget target and keeps "
            "at least 95 % of what the best of a grid of 20 keeps, of the retain set and of world facts in no batch.",
            forgetting.recommending,
        ),
        "robustness": Claim(
            "What was forgotten stays forgotten after rounding to 8 and 4 bits, and is relearned no faster than by a "
            "model that never saw it.",
            forgetting.robustness,
        ),
        "attacks": Claim(
            "On the demo no attack brings back more of what the default forgot than AdamW on a third of the rows, and "
            "of the default, without an adversary and with one, the worst attack brings back at most half of what it "
            "brings back of first order, second order and SOUL's steps on all weights with the same objective, and a "
            "third of what it brings back of the paper's method.",
            forgetting.attacks,
        ),
        "planted": Claim(
            "Exact attribution finds planted columns with a mean AUC of at least 0.95 and better than every other "
            "method, each under its best rule, and a better mask forgets deeper.",
            planted.planted,
        ),
        "planted_groups": Claim(
            "Of groups of people planted through a twentieth of the columns each, whose norms are free: without its "
            "columns a group is lost and no other; integrated gradients find them with a mean AUC of at least 0.95 and "
            "no worse than gradient x activation; and at the forget target its own columns keep more than as many "
            "random ones or another group's, and let less come back. By the 95 % intervals of the paired differences "
            "over seeds.",
            planted.groups,
        ),
        "knockout": Claim(
            "Neurons that support the log-likelihood of the forget set hold it: without them it is lost. Those that "
            "the literal loss selects are not missed.",
            planted.knockout,
        ),
        "attribution": Claim(
            "Packed attribution equals one pass per prefix; it is at least 15 times faster with all positions of 48 "
            "scored and 30 times with a quarter, and takes at most 1.1 of the time of the layerwise approximation; "
            "hooks add at most 5 % to a forward and backward pass.",
            speed.attribution,
        ),
        "attribution_budget": Claim(
            "On facts that SmolLM2-135M-Instruct knows a budget of half a pass per layer and row names at least 0.9 "
            "of the top 10 % of neurons of each layer that 32 Gauss-Legendre points name, at 5 times less processor "
            "time than ten midpoints took before layers shared their passes; one of two passes names more of them "
            "than gradient x activation of the positions that predict.",
            speed.attribution_budget,
        ),
        "attribution_quality": Claim(
            "On planted facts and on the demo's model one midpoint of the path names at least 0.9 of the top 10 % of "
            "neurons of each layer that 32 Gauss-Legendre points name; its contrast finds planted columns as well as "
            "that of ten midpoints (AUC at most 0.01 less), and better than gradient x activation.",
            speed.attribution_quality,
        ),
        "hooks": Claim(
            "On a 4-layer Llama (d 512, ff 2048, fp32, one thread) register_neuron_hooks adds at most 5 % to a "
            "forward and backward pass; where weights are trained it adds no memory but one sum per layer, where they "
            "are frozen the captured activations, which nothing else keeps.",
            speed.hooks,
        ),
        "deltas": Claim(
            "Under checkpointing 8-bit layers with deltas hold at most 0.25 of bitsandbytes' own layers; gradients "
            "and state are those of the selected columns; at 5 % a forward and backward pass over float layers takes "
            "at most 0.9 of one with a masked dense gradient.",
            speed.deltas,
        ),
        "gpu": Claim(
            "On one GPU every test marked gpu passes; at 5 % of the down projections of a model of 7 billion "
            "parameters a step is 5 times faster than dense masked Sophia, its state is two compact moments and its "
            "peak four.",
            gpu.gpu,
        ),
        "reliability": Claim(
            "Every bad call, command line and row is refused in one line and changes nothing, every damaged file is "
            "refused, and nothing is lost by a kill before any file operation of unlearn, attribute and patch apply.",
            reliability.withstood,
        ),
    }
)
"""Name -> claim. A result file holds the sentence, which no two claims share."""
