"""Ending a training that gets no better."""

from transformers import TrainerCallback


class EarlyStopping(TrainerCallback):
    """Ends a training after so many evaluations that were not the best.

    It counts in the record of the evaluations, so that an interrupted training ends where it would have ended: the
    counter of Transformers' own callback begins anew.

    Args:
        patience: the number of evaluations.
        first_step: the evaluations before this step don't count.
    """

    def __init__(self, patience: int, first_step: int = 0):
        if patience < 1:
            raise ValueError(f"--early_stopping_patience must be at least 1, got {patience}.")
        self.patience, self.first_step = patience, first_step

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_evaluate(args, state, control)  # of a training that goes on from the checkpoint at which it ended

    def on_evaluate(self, args, state, control, **kwargs):
        name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        lines = [line for line in state.log_history if name in line and line["step"] >= self.first_step]
        values = [line[name] if args.greater_is_better else -line[name] for line in lines]
        if values and len(values) - 1 - values.index(max(values)) >= self.patience:
            control.should_training_stop = True
