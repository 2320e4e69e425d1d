import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oasis_helpers.unet import AttentionBlock, UNet, count_parameters, timestep_embedding, trace_shapes


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
    st.sampled_from([None, 3]),
)
@settings(max_examples=40, deadline=None)
def test_output_has_the_shape_of_the_input(base, mult, blocks, patch, channels, height, width, classes):
    model = UNet(channels, base, mult, blocks, (len(mult) - 1,), patch, classes)
    size = patch * 2 ** (len(mult) - 1)
    x = torch.randn(2, channels, size * height, size * width)
    y = None if classes is None else torch.tensor([0, 2])
    assert model(x, torch.tensor([0, 999]), y).shape == x.shape


def test_other_outputs_and_the_bottleneck():
    model = _wake(UNet(base_channels=8, out_channels=4))
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([1, 5])
    assert model(x, t).shape == (2, 4, 16, 16)
    bottleneck, emb, skips = model.encode(x, t)
    assert bottleneck.shape == (2, 16, 2, 2)
    assert emb.shape == (2, 32)
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


def test_time_and_label_change_the_output_and_every_weight_learns():
    model = _wake(UNet(base_channels=8, channel_mult=(1, 2), attention_levels=(1,), num_classes=3))
    x = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([10]), torch.tensor([0])
    assert not torch.allclose(model(x, t, y), model(x, torch.tensor([900]), y), atol=1e-5)
    assert not torch.allclose(model(x, t, y), model(x, t, torch.tensor([1])), atol=1e-5)
    model(x, t, y).square().mean().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


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
        (lambda m: m(torch.zeros(1, 1, 32, 32), torch.zeros(1), torch.zeros(1)), "num_classes=None"),
        (lambda m: UNet(num_classes=2)(torch.zeros(1, 1, 32, 32), torch.zeros(1)), "no labels y"),
        (lambda m: UNet(attention_levels=(3,)), "levels 0 … 2"),
        (lambda m: timestep_embedding(torch.zeros(1), 7), "even"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(UNet(base_channels=8))
