"""The set-up of each rank. In: a configuration and the number of ranks; out: what memory and time depend on."""

from regpt2.config.run import RunConfig
from regpt2.training.memory import Setup
from regpt2.training.schedule import mean_window


def setup_of(config: RunConfig, ranks: int, *, device: str, precision: str, compiled: bool) -> Setup:
    """How each rank trains, as the estimates of memory and time need it.

    Raises:
        ConfigError: an update is not a whole number of passes.
    """
    return Setup(
        model=config.model,
        micro_batch=config.batch.micro_batch,
        seq_len=config.batch.seq_len,
        grad_accum_steps=config.batch.grad_accum_steps(ranks),
        precision=precision,
        device=device,
        compiled=compiled,
        strategy=config.parallel.strategy,
        ranks=ranks,
        optim=config.optim,
        lora=config.lora,
        mean_window=mean_window(config.schedule, getattr(config.model, "window", 0)),
    )
