"""What experience says about a run's settings: warnings with their reasons, never refusals."""

from collections.abc import Iterator

from job.plan.forecast import Plan
from job.settings import DataSettings, LoraSettings, TrainSettings

LEARNING_RATES = (5e-5, 5e-4)
SMALL_DATA_EXAMPLES = 1000
EXAMPLES_PER_BILLION = 100


def advise(
    train: TrainSettings, lora: LoraSettings, data: DataSettings, plan: Plan, *, num_parameters: int | None
) -> Iterator[str]:
    """Yield one sentence a doubt, each with the setting, its value and why."""
    rate, (low, high) = train.learning_rate, LEARNING_RATES
    if not low <= rate <= high:
        what = "learns little" if rate < low else "tends to diverge or to forget"
        yield (
            f"LEARNING_RATE={rate:g}: LoRA usually {what} {'below' if rate < low else 'above'} {low if rate < low else high:g} "
            "(QLoRA's own runs use 1e-4 to 2e-4, arXiv 2305.14314, table 9)"
        )
    ratio = lora.lora_alpha / lora.lora_r
    if not 0.5 <= ratio <= 4 and not lora.use_rslora:
        yield (
            f"LORA_ALPHA={lora.lora_alpha}: {ratio:g} times LORA_R={lora.lora_r}; the adapter counts alpha/r, and 1 or 2 is what "
            "others' learning rates were found with"
        )
    if num_parameters and plan.num_examples < (wanted := max(200, EXAMPLES_PER_BILLION * num_parameters / 1e9)):
        yield (
            f"DATASETS: {plan.num_examples:,} examples are few for {num_parameters / 1e9:.1f} billion parameters (at least "
            f"{wanted:,.0f} is common); they teach a style and no knowledge (LIMA, arXiv 2305.11206, used 1,000 chosen ones)"
        )
    epochs = plan.num_steps * plan.effective_batch_size / max(plan.num_examples, 1)
    if epochs > 3.01 and plan.num_examples < 10 * SMALL_DATA_EXAMPLES:
        yield (
            f"NUM_TRAIN_EPOCHS={train.num_train_epochs:g}: {epochs:.1f} passes over {plan.num_examples:,} examples often overfit "
            "after the third; set EVAL_STEPS and EARLY_STOPPING_PATIENCE"
        )
    if data.eval_fraction == 0 and not data.eval_datasets:
        yield "EVAL_FRACTION=0: nothing is held out, so nobody will see when the model overfits; 0.05 costs little"
    elif train.eval_steps is None and plan.num_steps > 200:
        yield f"EVAL_STEPS is not set: in {plan.num_steps:,} steps the held-out loss is measured only at the start and at the end"
    if plan.num_steps < 20:
        yield f"EFFECTIVE_BATCH_SIZE={train.effective_batch_size}: the run has only {plan.num_steps} steps; lower it for more"
