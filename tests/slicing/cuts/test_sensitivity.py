"""The statistics against autograd on the model's own loss; what counts and what does not; what is left behind."""

import pytest
import torch
from models import FAMILIES, ROWS, VOCABULARY, in_double, tiny_model, tokens
from slicing.cuts.problems import second_moment
from torch.nn import functional as F

from slicegpt_fast import InputError
from slicegpt_fast.architectures import Decoder, at, weights
from slicegpt_fast.slicing.cuts.sensitivity import layers_within, measure_sensitivity


def watched(model):
    """The paths of the writers that are modules, and of the norms, of the decoder layers."""
    decoder = Decoder(model)
    writers, norms = [], []
    for site, sublayer in decoder.sublayers():
        for branch in sublayer.branches:
            norms.append(f"{site.path}.{branch.norm}")
            if ("values" if branch.activation is None else "channels") not in decoder.architecture.axes:
                continue
            paths = [path for path in branch.writers if "experts" not in path and weights(site.part, (path,))]
            writers += [f"{site.path}.{path}" for path in paths]
    return writers, [*dict.fromkeys(norms), decoder.sites[-1].path]


def run(model, ids, paths):
    """The inputs [N, ...] and outputs of modules, the gradients of the summed loss there, and that loss."""
    seen = {}
    handles = [
        at(model, path).register_forward_hook(lambda _, args, output, path=path: seen.update({path: (args, output)}))
        for path in paths
    ]
    number = ids.shape[0] * (ids.shape[1] - 1)
    loss = model(input_ids=ids, labels=ids).loss * number
    gradients = torch.autograd.grad(loss, [seen[path][1] for path in paths])
    for handle in handles:
        handle.remove()
    gradients = {path: gradient.flatten(0, -2) for path, gradient in zip(paths, gradients, strict=True)}
    return {path: args for path, (args, _) in seen.items()}, {p: o for p, (_, o) in seen.items()}, gradients, loss


def mixed(x, g):
    """C, and the weights of its rows."""
    weight = g.square().sum(1)
    even = second_moment(x)
    uneven = (x.T * weight) @ x
    share = even.trace() / uneven.trace()
    return (even + share * uneven) / 2, (1 / len(x) + share * weight) / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_autograd(family):
    model, ids = in_double(tiny_model(family)), tokens(3, 20)
    found = measure_sensitivity(model, [ids[:2], ids[2:]], progress=False)
    writers, norms = watched(model)
    inputs, outputs, gradients, loss = run(model, ids, [*writers, *norms])
    assert found.tokens == 60
    assert found.loss == pytest.approx(loss.item() / 57, rel=1e-5)
    assert [path for path in found.writers if "experts" not in path] == writers
    assert list(found.sites) == norms
    for path in writers:
        (statistics,) = found.writers[path]
        x, g = inputs[path][0].detach().flatten(0, -2), gradients[path]
        expected, weight = mixed(x, g)
        torch.testing.assert_close(statistics.inputs, expected, rtol=1e-4, atol=1e-5 * expected.max().item())
        torch.testing.assert_close(statistics.mean, weight @ x, rtol=1e-4, atol=1e-5 * x.abs().max().item())
        assert statistics.mass == pytest.approx(weight.sum().item(), rel=1e-4)
        moment = second_moment(g)
        torch.testing.assert_close(statistics.gradients, moment, rtol=1e-4, atol=1e-5 * moment.max().item())
    for path in norms:
        norm = at(model, path)
        bias = getattr(norm, "bias", None)
        shifted = outputs[path] if bias is None else outputs[path] - bias
        gain = norm.weight.detach() + ROWS[family].norm_offset
        n = (shifted / gain).detach().flatten(0, -2)
        moment, expected = second_moment(n), second_moment(gradients[path] * gain)
        torch.testing.assert_close(found.sites[path].inputs, moment, rtol=1e-4, atol=1e-5 * moment.max().item())
        torch.testing.assert_close(found.sites[path].gradients, expected, rtol=1e-4, atol=1e-5 * expected.max().item())


def test_the_gradient_is_that_of_the_stream_behind_the_sublayer():
    model, ids = tiny_model().double(), tokens(2, 20)
    found = measure_sensitivity(model, [ids], progress=False)
    streams = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
        layer.register_forward_hook(lambda _, args, output: streams.append(output))
    loss = model(input_ids=ids, labels=ids).loss * 38
    gradients = torch.autograd.grad(loss, streams)
    assert len(found.writers) == len(gradients) == 6
    for (statistics,), gradient in zip(found.writers.values(), gradients, strict=True):
        torch.testing.assert_close(statistics.gradients, second_moment(gradient.flatten(0, 1)), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_experts_have_statistics_of_the_tokens_routed_to_them(family):
    model, ids = in_double(tiny_model(family)), tokens(2, 20)
    found = measure_sensitivity(model, [ids], progress=False)
    paths = [path for path in found.writers if "experts" in path]
    modules = {path: path.removesuffix(".down_proj") for path in paths}
    inputs, _, gradients, _ = run(model, ids, list(modules.values()))
    assert paths
    for path, module in modules.items():
        experts, (states, chosen, mixture) = at(model, module), inputs[module]
        assert len(found.writers[path]) == len(experts.down_proj) == 4
        for expert, statistics in enumerate(found.writers[path]):
            x, g = [], []
            for token, state in enumerate(states):
                for slot in range(chosen.shape[1]):
                    if chosen[token, slot] == expert:
                        gate, up = (experts.gate_up_proj[expert] @ state).chunk(2)
                        x.append(F.silu(gate) * up * mixture[token, slot])
                        g.append(gradients[module][token])
            if not x:
                assert not statistics.inputs.any()
                assert not statistics.gradients.any()
                continue
            x, g = torch.stack(x).detach(), torch.stack(g)
            expected, _ = mixed(x, g)
            torch.testing.assert_close(statistics.inputs, expected, rtol=1e-4, atol=1e-6 * expected.max().item())
            torch.testing.assert_close(statistics.gradients, g.T @ g / 40, rtol=1e-4, atol=1e-9)


def test_an_expert_that_no_token_is_routed_to():
    found = measure_sensitivity(tiny_model("mixtral"), [tokens(1, 2)], progress=False)
    experts = [each for path, writer in found.writers.items() if "experts" in path for each in writer]
    silent = [each for each in experts if each.mass == 0]
    assert 0 < len(silent) < len(experts)
    assert not any(each.inputs.any() or each.mean.any() or each.gradients.any() for each in silent)


@pytest.mark.parametrize("family", ["qwen2", "mixtral", "opt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_nowhere(family, side):
    model = in_double(tiny_model(family))
    long, short = tokens(1, 30), tokens(1, 19, seed=1)
    expected = measure_sensitivity(model, [long, short], progress=False)
    filler = torch.zeros(1, 11, dtype=torch.long)
    parts, masks = [filler, short], [torch.zeros_like(filler), torch.ones_like(short)]
    order = slice(None) if side == "left" else slice(None, None, -1)
    batch = {
        "input_ids": torch.cat([long, torch.cat(parts[order], 1)]),
        "attention_mask": torch.cat([torch.ones_like(long), torch.cat(masks[order], 1)]),
    }
    padded = measure_sensitivity(model, [batch], progress=False)
    assert padded.tokens == expected.tokens == 49
    assert padded.loss == pytest.approx(expected.loss, rel=1e-5)
    for path, writers in expected.writers.items():
        for left, right in zip(padded.writers[path], writers, strict=True):
            assert left.mass == pytest.approx(right.mass, rel=1e-4)
            for name in ("inputs", "mean", "gradients"):
                _assert_close(getattr(left, name), getattr(right, name))
    for path, site in expected.sites.items():
        _assert_close(padded.sites[path].inputs, site.inputs)
        _assert_close(padded.sites[path].gradients, site.gradients)


def _assert_close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5 * right.abs().max().item())


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [
            len(hooks)
            for module in model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        ],
        [(parameter.data_ptr(), parameter.grad) for parameter in model.parameters()],
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = tiny_model().train()
    model.model.layers[1].mlp.eval()
    model.model.layers[2].mlp.down_proj.weight.requires_grad_(False)
    last = model.lm_head
    before = state_of(model)
    if fails:

        def interrupt(*_):
            raise KeyboardInterrupt

        handle = last.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            measure_sensitivity(model, [tokens(2, 20)], progress=False)
        handle.remove()
    else:
        with torch.no_grad():  # the caller's mode plays no part
            measure_sensitivity(model, [tokens(2, 20)], progress=False)
    *after, values = state_of(model)
    assert tuple(after) == before[:-1]
    assert all(torch.equal(values[name], tensor) for name, tensor in before[-1].items())


def test_bad_calibration_is_named():
    model = tiny_model()
    for nothing in ([], [tokens(3, 1)]):
        with pytest.raises(InputError, match="no token to predict: give sequences of at least two"):
            measure_sensitivity(model, nothing, progress=False)
    with pytest.raises(InputError, match=f"holds token id {VOCABULARY}"):
        measure_sensitivity(model, [torch.full((1, 8), VOCABULARY)], progress=False)


def test_statistics_that_are_not_finite_name_the_place():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 5] = torch.inf
    with pytest.raises(InputError, match=r"at model\.layers\.\d\.\S+ are not finite: check the weights"):
        measure_sensitivity(model, [tokens(2, 20)], progress=False)


@pytest.mark.parametrize("family", ["llama", "phi", "qwen3-moe"])
def test_groups_of_layers_have_the_statistics_of_all_at_once(family):
    model, batches = tiny_model(family), [tokens(2, 20), tokens(2, 20, seed=1)]
    whole = measure_sensitivity(model, batches, progress=False)
    parts = [measure_sensitivity(model, batches, layers=layers, progress=False) for layers in (range(1), range(1, 3))]
    assert [path for part in parts for path in part.writers] == list(whole.writers)
    assert [path for part in parts for path in part.sites] == list(whole.sites)
    for part in parts:
        assert (part.tokens, part.loss) == (whole.tokens, whole.loss)
        for path, writers in part.writers.items():
            for left, right in zip(writers, whole.writers[path], strict=True):
                assert torch.equal(left.inputs, right.inputs)
                assert torch.equal(left.gradients, right.gradients)
        for path, site in part.sites.items():
            assert torch.equal(site.inputs, whole.sites[path].inputs)
            assert torch.equal(site.gradients, whole.sites[path].gradients)


def test_only_the_statistics_of_the_axes_are_taken():
    found = {
        axis: measure_sensitivity(tiny_model(), [tokens(2, 20)], axes=(axis,), progress=False)
        for axis in ("stream", "channels", "values")
    }
    assert {axis: (len(each.writers), len(each.sites)) for axis, each in found.items()} == {
        "stream": (0, 7),
        "channels": (3, 0),
        "values": (3, 0),
    }


def test_groups_fill_the_memory_and_no_more():
    decoder = Decoder(tiny_model())
    layer = 8 * (2 * 80**2 + 48**2) + 8 * (2 * 48**2 + 48**2) + 2 * 16 * 48**2
    for memory, ends in [(0, (1, 2, 3)), (2 * layer - 1, (1, 2, 3)), (2 * layer, (2, 3, 3)), (3 * layer, (3, 3, 3))]:
        assert [layers_within(decoder, start, memory) for start in range(3)] == [
            range(start, end) for start, end in enumerate(ends)
        ]
