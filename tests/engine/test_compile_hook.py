"""Training by ``torch.compile``, in real runs."""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import Runner
from torch._dynamo.backends.common import aot_autograd

from mmcnv2.registry import HOOKS, MODELS

# Not relative, for this is run as a script too.
from tests.commands import run_tool
from tests.engine.test_nonfinite_loss import FCMAE, make_runner

HOOK = dict(type='mmcnv2.CompileHook')
# No compiler, but the graphs that it would get.
GRAPHS = dict(HOOK, mode='default', fullgraph=True)


@pytest.fixture
def backend(fresh_compiler):
    """Counts the graphs and their runs, and runs them as they are."""
    counts = Counter()

    def compile_nothing(graph, inputs):
        counts['graphs'] += 1

        def run(*args):
            counts['runs'] += 1
            return graph(*args)

        return run

    yield compile_nothing, counts
    torch.compiler.set_stance('default')


def train(tmp_path, *hooks, wrap=lambda model: model, **more) -> Runner:
    torch.manual_seed(0)
    runner = make_runner(tmp_path, wrap(MODELS.build(FCMAE)), hook=None)
    runner.optim_wrapper |= more
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


def reuse_memory(graph, inputs):
    """Write over what was put out before, as CUDA graphs do."""
    before = []

    def run(*args):
        for out in before:
            out.fill_(float('nan'))
        outs = graph(*args)
        given = {each.data_ptr() for each in args if isinstance(each, torch.Tensor)}
        tensors = [out for out in outs if isinstance(out, torch.Tensor)]
        before[:] = [out for out in tensors if out.data_ptr() not in given]
        return [out.detach() if isinstance(out, torch.Tensor) else out for out in outs]

    return make_boxed_func(run)


def test_accumulated_gradients(tmp_path, backend):
    def as_it_is(graph, inputs):
        return make_boxed_func(graph.forward)

    graphs = aot_autograd(fw_compiler=as_it_is, bw_compiler=reuse_memory)
    accumulate = dict(accumulative_counts=4)
    expected = train(tmp_path, **accumulate).model.state_dict()
    found = train(tmp_path, dict(GRAPHS, backend=graphs), **accumulate)
    for name, value in found.model.state_dict().items():
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
    for before, after in (
        (hook.before_val_epoch, hook.after_val_epoch),
        (hook.before_test_epoch, hook.after_test_epoch),
    ):
        counts.clear()
        before(runner)
        runner.model(pictures)
        assert not counts
        after(runner)
        runner.model(pictures)
        assert counts['runs'] == 1


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


def train_as_one_of_two(folder: Path) -> None:
    """Run in each of two processes, by ``test_two_processes``."""
    torch.distributed.init_process_group('gloo')
    for hooks in ([], [dict(GRAPHS, backend='aot_eager')]):
        wrap = MMDistributedDataParallel
        runner = train(folder, *hooks, wrap=wrap, accumulative_counts=2)
        weights = [param.detach().flatten() for param in runner.model.parameters()]
        print(f'weights {torch.cat(weights).double().square().sum():.9f}')


def test_two_processes(tmp_path):
    output = run_tool([__file__, str(tmp_path)], tmp_path, processes=2).stdout
    found = [float(number) for number in re.findall(r'weights (.*)', output)]
    assert found == pytest.approx(4 * found[:1], rel=1e-6), output


if __name__ == '__main__':
    train_as_one_of_two(Path(sys.argv[1]))
