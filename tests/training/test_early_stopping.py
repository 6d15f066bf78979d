"""When a training ends early."""

from types import SimpleNamespace

import pytest

from repvgg_hf.training.early_stopping import EarlyStopping


@pytest.mark.parametrize(
    ("values", "first_step", "stops"),
    [([5, 6, 6], 0, False), ([5, 6, 6, 4], 0, True), ([5, 6, 6, 7], 0, False), ([9, 8, 1, 2], 3, False)],
)
def test_it_waits_for_two_evaluations_after_the_best(values, first_step, stops):
    history = [{"step": step, "eval_top1": value} for step, value in enumerate(values, 1)]
    state, control = SimpleNamespace(log_history=history), SimpleNamespace(should_training_stop=False)
    args = SimpleNamespace(metric_for_best_model="top1", greater_is_better=True)
    EarlyStopping(2, first_step).on_evaluate(args, state, control)
    assert control.should_training_stop == stops
    control.should_training_stop = False
    EarlyStopping(2, first_step).on_train_begin(args, state, control)  # as when it is resumed there
    assert control.should_training_stop == stops
