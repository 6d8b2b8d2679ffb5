"""SIMU as a trainer of open-unlearning: src/trainer/unlearn/simu.py there."""

from contextlib import nullcontext

from torch.nn import functional
from trainer.unlearn.grad_diff import GradDiff

from torch_simu import NeuronSelection, SIMUOptimizer, attribute_neurons, register_neuron_hooks
from torch_simu.optimizer import GradientBalance


class SIMU(GradDiff):
    """Whitened and balanced steps on the neurons that the forget rows rest on."""

    def __init__(self, fraction=1.0, attribution_steps=10, betas=(0.9, 0.8), hessian_interval=5, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fraction, self.attribution_steps = fraction, attribution_steps
        self.betas, self.hessian_interval = tuple(betas), hessian_interval
        self.hooks = None
        # The other kind passes no gradient on to layers behind frozen ones.
        self.args.gradient_checkpointing_kwargs = {"use_reentrant": False}

    def select_neurons(self):
        if self.fraction == 1:
            return NeuronSelection.full(self.model)
        # Rows as the dataset has them: the collator masks every token that is equal to the padding, ends of turns, too.
        rows = self.train_dataset.forget
        batches = [{name: row[name][None] for name in ("input_ids", "labels")} for row in rows]
        # The faster methods need the caches of transformers 5.
        scores = attribute_neurons(self.model, batches, steps=self.attribution_steps, method="prefix")
        return scores.top(self.fraction)

    def create_optimizer(self):
        if self.is_deepspeed_enabled or self.accelerator.num_processes > 1:
            raise ValueError("SIMU runs in one process without DeepSpeed: start it with python, not accelerate.")
        selection = self.select_neurons()
        self.optimizer = self.simu = SIMUOptimizer(
            selection.param_groups(self.model),
            lr=self.args.learning_rate,
            betas=self.betas,
            weight_decay=self.args.weight_decay,
            hessian_interval=self.hessian_interval,
            curvature="both",
            # In 16 bits short steps would be lost to rounding.
            master_weights=self.model.dtype.itemsize == 2,
        )
        self.balance = GradientBalance(self.simu)
        self.hooks = register_neuron_hooks(self.model, selection, reduce="covariance", outputs=True, recording=False)
        return self.optimizer

    def forget_loss(self, model, batch):
        """The mean probability of the answer tokens: it is bounded, and fades once they are forgotten."""
        logits, labels = model(**batch).logits[:, :-1].float(), batch["labels"][:, 1:]
        nll = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        return nll[labels != -100].neg().exp().mean()

    def training_step(self, model, inputs, *_):
        model.train()
        inputs = self._prepare_inputs(inputs)
        names = ("input_ids", "attention_mask", "labels")
        forget, retain = ({name: inputs[part][name] for name in names} for part in ("forget", "retain"))
        with self.hooks.recording() if self.simu.hessian_due else nullcontext():
            with self.balance.forget():
                forget_loss = self.forget_loss(model, forget)
                self.accelerator.backward(self.gamma * forget_loss)
            retain_loss = self.compute_retain_loss(model, retain)
            self.accelerator.backward(retain_loss)
        # Behind the last micro-batch of a step.
        if self.accelerator.sync_gradients:
            if self.simu.hessian_due:
                self.simu.update_curvature(self.hooks)
                self.hooks.reset()
            self.balance.combine_(retain_weight=self.alpha)
        loss = self.gamma * forget_loss + self.alpha * retain_loss
        return loss.detach() / self.args.gradient_accumulation_steps

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.hooks is not None:
                self.hooks.remove()
