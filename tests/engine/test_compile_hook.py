"""Training by ``torch.compile``, in real runs."""

from collections import Counter

import pytest
import torch
from mmengine.runner import Runner

from mmcnv2.registry import HOOKS, MODELS

from .test_nonfinite_loss import FCMAE, make_runner

HOOK = dict(type='mmcnv2.CompileHook')
# No compiler, but the graphs that it would get.
GRAPHS = dict(HOOK, mode='default', fullgraph=True)


@pytest.fixture
def backend():
    """Counts the graphs and their runs, and runs them as they are."""
    torch.compiler.reset()
    counts = Counter()

    def compile_nothing(graph, inputs):
        counts['graphs'] += 1

        def run(*args):
            counts['runs'] += 1
            return graph(*args)

        return run

    yield compile_nothing, counts
    torch.compiler.reset()
    torch.compiler.set_stance('default')


def train(tmp_path, *hooks, **more) -> Runner:
    torch.manual_seed(0)
    runner = make_runner(tmp_path, MODELS.build(FCMAE), hook=None)
    for hook in hooks:
        runner.register_hook(HOOKS.build(hook))
    runner.train()
    return runner


def test_same_training_by_one_graph(tmp_path, backend):
    compiler, counts = backend
    expected = train(tmp_path).model.state_dict()
    found = train(tmp_path, dict(GRAPHS, backend=compiler)).model.state_dict()
    # Ten iterations, each under a mask of its own.
    assert counts == dict(graphs=1, runs=10)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_another_part(tmp_path, backend):
    compiler, counts = backend
    train(tmp_path, dict(GRAPHS, module='neck', backend=compiler))
    assert counts == dict(graphs=1, runs=10)


def test_validation_runs_as_usual(tmp_path, backend):
    compiler, counts = backend
    hook = HOOKS.build(dict(GRAPHS, module='neck', backend=compiler))
    runner = make_runner(tmp_path, MODELS.build(FCMAE), hook=None)
    hook.before_train(runner)
    pictures = torch.rand(2, 3, 64, 64)
    hook.before_val(runner)
    runner.model(pictures)
    assert not counts
    hook.after_val(runner)
    runner.model(pictures)
    assert counts == dict(graphs=1, runs=1)


def test_layers_of_a_loss_that_is_not_finite_are_found(tmp_path, backend):
    torch.manual_seed(0)
    model = MODELS.build(FCMAE)
    model.init_weights()
    model.backbone.stages[1][0].pwconv1.weight.data.fill_(3e38)
    runner = make_runner(tmp_path, model)
    runner.register_hook(HOOKS.build(dict(GRAPHS, backend=backend[0])))
    with pytest.raises(FloatingPointError, match=r'stages\.1\.0\.pwconv1 \(Linear\)'):
        runner.train()


def test_part_that_is_not_there(tmp_path):
    message = "'backbones', but FCMAE has no such part; it has .*backbone, neck, head"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, dict(HOOK, module='backbones'))


def test_not_where_features_are_measured(tmp_path):
    diversity = dict(type='mmcnv2.FeatureDiversityHook')
    with pytest.raises(ValueError, match='do not go together'):
        train(tmp_path, HOOK, diversity)
