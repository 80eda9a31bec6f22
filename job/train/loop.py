"""TRL's SFTTrainer with five changes: whose checkpoints it writes and reads, which loss it computes for small vocabularies,
that an evaluation leaves no trace in the random numbers, that single steps can be passed over, and that several ranks share
each step's examples exactly, where accelerate would train on some of them twice.
"""

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from trl import SFTTrainer

from job.events import Phase
from job.plan.footprint import PLAIN_LOGITS
from job.train.faults import Faults
from job.train.gauge import Gauge
from job.train.loss import plain_loss
from job.train.ranks import FILLER_TOKENS, Shares, with_filler
from job.train.state import load_adapter, load_optimizer, load_rng, put_rng, take_rng
from job.train.watch import Watch


class Loop(SFTTrainer):
    """One training loop, watched by `watch`."""

    def __init__(self, *, watch: Watch, faults: Faults, skip_steps: tuple[int, ...] = (), **options: Any) -> None:
        self._ranks = watch.ranks
        if self._ranks.are_several:
            held_out = options["eval_dataset"]
            options["train_dataset"] = with_filler(options["train_dataset"])
            options["eval_dataset"] = with_filler(held_out) if held_out is not None else None
        super().__init__(callbacks=[watch], **options)
        self._watch, self._faults, self._skip_steps = watch, faults, frozenset(skip_steps)
        self._step_loss, self._norm = torch.zeros((), device=self.args.device), torch.zeros(())
        self.gauge = Gauge()
        watch.trainer = self

    @property
    def are_several(self) -> bool:
        """Whether other ranks train on the rest of each step's examples; then the last row of each set is a filler."""
        return self._ranks.are_several

    @property
    def is_skipping(self) -> bool:
        """Whether the step under way is one that learns nothing."""
        return self.state.global_step + 1 in self._skip_steps

    def take_loss_and_norm(self) -> tuple[float, float]:
        """(loss, gradient norm before clipping) of the step under way, in one wait for the device."""
        norm = torch.as_tensor(self._norm, dtype=torch.float32, device=self._step_loss.device)
        loss, norm = torch.stack([self._step_loss, norm]).tolist()
        self._step_loss = torch.zeros_like(self._step_loss)
        return loss, norm

    def examples_of(self, first_step: int, last_step: int) -> list[int]:
        """Indices in the training set of what these steps train on, in order; a step does not reach over an epoch's end."""
        if self._ranks.are_several:
            return self._shared_examples_of(first_step, last_step)
        found = []
        for step in range(first_step - 1, last_step):
            batches = self.get_train_dataloader()
            accumulation = self.args.gradient_accumulation_steps
            num_steps = -(-len(batches) // accumulation)  # rounded up
            batches.set_epoch(step // num_steps)
            begin = step % num_steps * accumulation
            found += [index for batch in islice(batches.batch_sampler, begin, begin + accumulation) for index in batch]
        return found

    def _shared_examples_of(self, first_step: int, last_step: int) -> list[int]:
        shares, found = self._shares(), []
        for step in range(first_step - 1, last_step):
            begin = step % self._steps_per_epoch * self._examples_per_step
            found += shares.order(step // self._steps_per_epoch)[begin : begin + self._examples_per_step]
        return found

    def filler_tokens(self, step: int) -> int:
        """What transformers has counted of fillers in this step: they are in the last one of an epoch."""
        if not self._ranks.are_several or not self._is_shared or step % self._steps_per_epoch:
            return 0
        return self._shares().num_fillers * FILLER_TOKENS

    @property
    def _examples_per_step(self) -> int:
        return int(self.args.per_device_train_batch_size * self._ranks.num * self.args.gradient_accumulation_steps)

    @property
    def _steps_per_epoch(self) -> int:
        return -(-(len(self.train_dataset) - 1) // self._examples_per_step)

    @property
    def _is_shared(self) -> bool:
        """Whether the order is ours; TRAIN_ARGS may ask for another."""
        return self.args.train_sampling_strategy in ("random", "sequential")

    def _shares(self) -> Shares:
        seed = self.args.data_seed if self.args.train_sampling_strategy == "random" else None
        return Shares(
            len(self.train_dataset) - 1,
            multiple=self.args.per_device_train_batch_size * self._ranks.num,
            seed=seed,
            epoch=lambda: self.state.global_step // self._steps_per_epoch,
        )

    # What follows is called by transformers.

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self._ranks.are_several or not self._is_shared:
            return super()._get_train_sampler(train_dataset)
        return self._shares()

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if not self._ranks.are_several:
            return super()._get_eval_sampler(eval_dataset)
        multiple = self.args.per_device_eval_batch_size * self._ranks.num
        return Shares(len(eval_dataset) - 1, multiple=multiple, seed=None)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        loader = super().get_eval_dataloader(eval_dataset)
        if self._ranks.are_several:
            loader.dataset.total_dataset_length = len(loader.dataset) - 1  # accelerate leaves out losses beyond it
        return loader

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return self._compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.gauge.look(model, inputs["input_ids"]):
            return self._compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Any) -> Any:
        vocabulary = self.model.config.get_text_config().vocab_size  # `model` may be wrapped for several ranks
        if return_outputs or inputs["input_ids"].numel() * vocabulary > PLAIN_LOGITS:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False).logits
        loss = plain_loss(logits, inputs["labels"], num_items_in_batch)
        # The count is of all ranks, whose gradients are averaged: as `Trainer.compute_loss` does.
        return loss * self._ranks.num if num_items_in_batch is not None else loss

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        step, is_last = self.state.global_step + 1, self.accelerator.sync_gradients
        if self.is_skipping:
            # Neither accelerate's optimizer nor a scaler moves without this.
            self.accelerator.gradient_state._set_sync_gradients(False)
            return torch.zeros_like(self._step_loss)
        self._faults.strike("step" if is_last else "micro", step, micro_batch=len(inputs["input_ids"]))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if is_last:
            loss = self._faults.spoil(loss, step)
        self._step_loss = self._step_loss + loss
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        return torch.zeros(()) if self.is_skipping else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self._norm = super()._get_grad_norm(model, grad_norm)
        return self._norm

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        rng, phase = take_rng(), self._watch.phase
        self._watch.phase = Phase.EVALUATE
        metrics: dict[str, float] = super().evaluate(*args, **options)
        self._watch.phase = phase
        put_rng(rng)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._watch.save()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(self, Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Comes with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_rng(Path(checkpoint))

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Our own card is written at the end; TRL's would name paths of this machine at every save."""
