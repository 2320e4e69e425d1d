import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oasis_helpers.conditions import Factor, Label, Tokens, from_json, to_json, without
from oasis_helpers.unet import (
    AttentionBlock,
    CrossAttentionBlock,
    UNet,
    count_parameters,
    timestep_embedding,
    trace_shapes,
)

CONDITIONS = {"label": Label(3), "height": Factor(-10, 10), "words": Tokens(vocabulary=5, length=4, layers=1)}
Y = {
    "label": torch.tensor([0, 2]),
    "height": torch.tensor([-10.0, 4.0]),
    "words": torch.tensor([[0, 1, -1, -1], [4, 3, 2, 1]]),
}


def _wake(model, seed=0):
    """Replace the zero weights, so that the output depends on the input."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        with torch.no_grad():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


@given(
    st.sampled_from([4, 8, 12, 20]),
    st.sampled_from([(1,), (1, 2), (2, 1, 3), (1, 1, 1, 1)]),
    st.integers(1, 2),
    st.sampled_from([1, 2]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 3),
    st.sets(st.sampled_from(sorted(CONDITIONS))),
)
@settings(max_examples=40, deadline=None)
def test_output_has_the_shape_of_the_input(base, mult, blocks, patch, channels, height, width, told):
    conditions = {name: CONDITIONS[name] for name in told}
    model = UNet(channels, base, mult, blocks, (len(mult) - 1,), patch, conditions)
    size = patch * 2 ** (len(mult) - 1)
    x = torch.randn(2, channels, size * height, size * width)
    y = {name: Y[name] for name in told}
    assert model(x, torch.tensor([0, 999]), y).shape == x.shape
    assert model(x, torch.tensor([0, 999])).shape == x.shape


def test_other_outputs_and_the_bottleneck():
    model = _wake(UNet(base_channels=8, out_channels=4))
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([1, 5])
    assert model(x, t).shape == (2, 4, 16, 16)
    emb, context = model.embed(t)
    bottleneck, skips = model.encode(x, emb, context)
    assert bottleneck.shape == (2, 16, 2, 2)
    assert emb.shape == (2, 32)
    assert context is None
    assert [s.shape[-1] for s in skips] == [8, 8, 4, 4, 2, 2]


def test_attention_in_bf16_stays_near_fp32():
    block = _wake(AttentionBlock(64))
    x = torch.randn(2, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = block(x).float()
    assert 0 < (rough - block(x)).norm() / block(x).norm() < 0.01


def test_a_fresh_network_says_zero():
    out = UNet(base_channels=8)(torch.randn(2, 1, 16, 16), torch.tensor([1, 5]))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("channels", [64, 40])  # two heads; one, since 32 does not divide 40
def test_attention_is_pytorchs(channels):
    block, theirs = _wake(AttentionBlock(channels)), nn.MultiheadAttention(channels, max(1, channels // 32))
    x = torch.randn(2, channels, 3, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs.in_proj_weight.copy_(block.qkv.weight.flatten(1))
        theirs.in_proj_bias.copy_(block.qkv.bias)
        theirs.out_proj.weight.copy_(block.out.weight.flatten(1))
        theirs.out_proj.bias.copy_(block.out.bias)
        pixels = block.norm(x).flatten(2).permute(2, 0, 1)  # (N, B, C)
        expected = x + theirs(pixels, pixels, pixels)[0].permute(1, 2, 0).reshape(x.shape)
        torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


def test_cross_attention_is_pytorchs():
    block = _wake(CrossAttentionBlock(64, 24))
    theirs = nn.MultiheadAttention(64, 2, kdim=24, vdim=24)
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 64, 3, 5, generator=generator), torch.randn(2, 7, 24, generator=generator)
    with torch.no_grad():
        theirs.q_proj_weight.copy_(block.q.weight.flatten(1))
        for own, part in zip((theirs.k_proj_weight, theirs.v_proj_weight), block.kv.weight.chunk(2)):
            own.copy_(part)
        theirs.in_proj_bias.copy_(torch.cat([block.q.bias, block.kv.bias]))
        theirs.out_proj.weight.copy_(block.out.weight.flatten(1))
        theirs.out_proj.bias.copy_(block.out.bias)
        pixels = block.norm(x).flatten(2).permute(2, 0, 1)
        tokens = block.norm_context(context).transpose(0, 1)
        expected = x + theirs(pixels, tokens, tokens)[0].permute(1, 2, 0).reshape(x.shape)
        torch.testing.assert_close(block(x, None, context), expected, atol=1e-5, rtol=1e-5)


# ---- conditions -------------------------------------------------------------------------------------


def _conditional():
    return _wake(UNet(1, 8, (1, 2), attention_levels=(1,), conditions=CONDITIONS))


def test_every_condition_changes_the_output_and_every_weight_learns():
    model, t = _conditional(), torch.tensor([10, 10])
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = model(x, t, Y)
    assert not torch.allclose(whole, model(x, torch.tensor([900, 900]), Y), atol=1e-5)
    for name in Y:
        other = Y | {name: Y[name].flip(0)}
        assert not torch.allclose(whole, model(x, t, other), atol=1e-5), name
        rest = {k: v for k, v in Y.items() if k != name}
        nothing = rest | {name: CONDITIONS[name].nothing(2)}
        torch.testing.assert_close(model(x, t, rest), model(x, t, nothing))  # left out is nothing
        assert not torch.allclose(whole, model(x, t, rest), atol=1e-5), name
    mixed = without(CONDITIONS, Y, torch.tensor([True, False]))
    model(x, t, mixed).square().mean().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


def test_with_and_without_conditions_in_one_batch():
    # What guidance needs: two half batches or one double batch give the same.
    model, t = _conditional(), torch.tensor([10, 700])
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    nothing = without(CONDITIONS, Y, torch.tensor([True, True]))
    double = {name: torch.cat([Y[name], nothing[name]]) for name in Y}
    found = model(torch.cat([x, x]), torch.cat([t, t]), double)
    torch.testing.assert_close(found, torch.cat([model(x, t, Y), model(x, t)]), atol=1e-5, rtol=1e-5)


def test_rows_are_dropped_as_told():
    found = without(CONDITIONS, Y, torch.tensor([False, True]))
    assert found["label"].tolist() == [0, -1]
    assert found["words"].tolist() == [[0, 1, -1, -1], [-1, -1, -1, -1]]
    assert found["height"][0] == -10
    assert found["height"][1].isnan()


def test_a_number_is_embedded_near_its_neighbours():
    # A network that could tell 0.431 from 0.432 at once would learn cases by heart by their numbers.
    embedding = Factor(18, 98).embedding(128)
    with torch.no_grad():
        here, *others = embedding(torch.tensor([50.0, 50.3, 58.0]))
    near, far = (float((other - here).norm()) for other in others)
    assert 0 < 5 * near < far


def test_descriptions_survive_json():
    import json

    assert from_json(json.loads(json.dumps(to_json(CONDITIONS)))) == CONDITIONS
    with pytest.raises(ValueError, match="kind 'smell'"):
        from_json({"a": {"kind": "smell"}})


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ({"label": torch.tensor([0, 3])}, r"label runs from 0 to 3: this network knows 0 … 2"),
        ({"label": torch.tensor([0.0, 1.0])}, r"label is torch.float32 .* give integers \(B\)"),
        ({"height": torch.tensor([0.0, 11.0])}, r"height runs from 0 to 11: this network knows -10 to 10"),
        ({"height": torch.tensor([0, 1])}, r"height is torch.int64"),
        ({"words": torch.zeros(2, 3, dtype=torch.long)}, r"give integers \(B, 4\)"),
        ({"words": torch.full((2, 4), 5)}, "words runs from 5 to 5"),
        ({"label": torch.tensor([0])}, "label has 1 values for a batch of 2"),
        ({"age": torch.tensor([0, 1])}, "'age', but this network has the conditions label, height, words"),
    ],
)
def test_conditions_that_do_not_fit_are_named(y, message):
    with pytest.raises(ValueError, match=message):
        _conditional()(torch.zeros(2, 1, 16, 16), torch.zeros(2, dtype=torch.long), y)
    with pytest.raises(ValueError, match="low must be below high"):
        Factor(1, 1)


def test_images_of_a_batch_do_not_mix():
    model = _wake(UNet(base_channels=8))
    x = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([3, 500, 990])
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(x, t), alone, atol=1e-5, rtol=1e-4)


def test_embedding_equals_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0, 1, 17, 999])
    reference = get_timestep_embedding(t, 32, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(t, 32), reference, atol=1e-5, rtol=0)


def test_trace_counts_every_block():
    model = UNet(base_channels=8, channel_mult=(1, 2), attention_levels=(1,))
    rows = trace_shapes(model, 32)
    assert rows[0][2] == (8, 16, 16)
    assert rows[-1][2] == (4, 16, 16)
    assert ("middle", "ResBlock + attention") in [r[:2] for r in rows]
    rest = count_parameters(model.time_mlp) + count_parameters(model.norm)
    assert sum(r[3] for r in rows) + rest == count_parameters(model)
    assert not model.stem._forward_hooks


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(1, 1, 30, 32), torch.zeros(1)), "divide by 8"),
        (lambda m: m(torch.zeros(1, 3, 32, 32), torch.zeros(1)), r"\(B, 1, H, W\)"),
        (lambda m: m(torch.zeros(1, 1, 32, 32), torch.zeros(1), {"a": torch.zeros(1)}), "'a', .* has none"),
        (lambda m: UNet(attention_levels=(3,)), "levels 0 … 2"),
        (lambda m: timestep_embedding(torch.zeros(1), 7), "even"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(UNet(base_channels=8))
