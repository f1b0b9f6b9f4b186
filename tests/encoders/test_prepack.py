import gc
import json
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import nn
from transformers import BertConfig, BertModel

from csalign.core import onednn
from csalign.encoders import prepack as prepack_module
from csalign.encoders.openclip import _TextSide
from csalign.encoders.prepack import pack_layers, prepack

REQUIRED = ("_reorder_linear_weight", "_linear_pointwise")
TOLERANCE = 2e-6


def can_pack() -> bool:
    probe = nn.Linear(8, 8).eval().requires_grad_(False)
    return pack_layers(probe) == 1


CAN_PACK = can_pack()
needs_onednn = pytest.mark.skipif(not CAN_PACK, reason="this build of torch cannot pack")


def freeze(network: Any) -> Any:
    return network.eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def same_numbers() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        yield


@pytest.fixture
def clip(tiny_clip: tuple[Path, Path]) -> Any:
    return freeze(open_clip.CLIP(**json.loads(tiny_clip[0].read_text())))


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    scale = expected.float().abs().max()
    assert (actual.float() - expected.float()).abs().max() <= tolerance * scale


def check(network: Any, run: Callable[[int], torch.Tensor], layers: int) -> None:
    """Compare outputs of several batch sizes before and after packing."""
    with torch.inference_mode():
        expected = {size: run(size) for size in (1, 5, 3)}
    assert pack_layers(network) == (layers if CAN_PACK else 0)
    with torch.inference_mode():
        for size, before in expected.items():
            after = run(size)
            assert_same(after, before)
            assert_same(after, run(5)[:size])


def test_image_tower_stays_the_same(clip: Any) -> None:
    pixels = torch.randn(5, 3, *clip.visual.image_size)
    layers = 3 * len(clip.visual.transformer.resblocks)
    check(clip.visual, lambda size: clip.visual(pixels[:size]), layers)


def test_text_tower_stays_the_same_whole_and_cropped(clip: Any) -> None:
    side = _TextSide(clip, "hidden")
    ids = torch.randint(1, clip.vocab_size - 1, (5, clip.context_length))
    with torch.inference_mode():
        whole, cropped = side.embed(ids), side.embed(ids[:, :6])

    pack_layers(clip)

    with torch.inference_mode():
        for length, expected in ((clip.context_length, whole), (6, cropped)):
            actual = side.embed(ids[:, :length])
            assert actual[1] is not None
            assert expected[1] is not None
            assert_same(actual[0], expected[0])
            assert_same(actual[1], expected[1])
            assert_same(side.embed(ids[2:3, :length])[0], actual[0][2:3])


def test_linear_projection_of_a_custom_text_tower_is_still_seen_as_linear(
    tiny_clip: tuple[Path, Path],
) -> None:
    config = json.loads(tiny_clip[0].read_text())
    config["text_cfg"] |= {"proj_bias": True}
    network = freeze(open_clip.CustomTextCLIP(**config))
    ids = torch.randint(1, 30, (5, network.context_length))
    layers = 1 + 3 * len(network.text.transformer.resblocks)

    check(network.text, lambda size: network.encode_text(ids[:size]), layers)


def test_timm_vit_stays_the_same() -> None:
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=7
    )
    pixels = torch.randn(5, 3, 32, 32)
    check(freeze(network), lambda size: network(pixels[:size]), 9)


def test_bert_stays_the_same_with_padding() -> None:
    config = BertConfig(
        vocab_size=90,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
    )
    network = freeze(BertModel(config))
    ids, mask = torch.randint(0, 90, (5, 9)), torch.ones(5, 9, dtype=torch.long)
    mask[::2, 5:] = 0

    def run(size: int) -> torch.Tensor:
        output = network(input_ids=ids[:size], attention_mask=mask[:size])
        first: torch.Tensor = output.last_hidden_state[:, 0]
        return first

    check(network, run, 13)  # six a layer, and the pooler


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", ["none", "float", "bool", "bool of each head"])
def test_attention_stays_the_same(batch_first: bool, bias: bool, mask: str) -> None:
    attention = freeze(nn.MultiheadAttention(24, 3, bias=bias, batch_first=batch_first))
    x = torch.randn((2, 7, 24) if batch_first else (7, 2, 24))
    causal = torch.ones(7, 7).triu(1).bool()
    each = torch.rand(6, 7, 7) < 0.4
    each[..., 0] = False  # nothing may be forbidden everything
    masks = {
        "none": None,
        "bool": causal,
        "float": torch.zeros(7, 7).masked_fill(causal, float("-inf")) + torch.randn(7, 7),
        "bool of each head": each,
    }
    options = {"need_weights": False, "attn_mask": masks[mask]}
    expected, _ = attention(x, x, x, **options)

    assert pack_layers(attention) == CAN_PACK

    for inference in (True, False):
        with torch.inference_mode(inference):
            actual, weights = attention(x, x, x, **options)
        assert_same(actual, expected)
        assert weights is None


def test_what_packed_attention_is_not_made_for_is_still_right() -> None:
    attention = freeze(nn.MultiheadAttention(24, 3, batch_first=True))
    x, other = torch.randn(2, 7, 24), torch.randn(2, 4, 24)
    padding = torch.zeros(2, 7).bool()
    padding[:, 5:] = True

    def run() -> list[torch.Tensor]:
        return [
            *attention(x, x, x),  # with weights
            attention(x, other, other, need_weights=False)[0],
            attention(x, x, x, need_weights=False, key_padding_mask=padding)[0],
            attention(x[0], x[0], x[0], need_weights=False)[0],
        ]

    expected = run()
    pack_layers(attention)

    for after, before in zip(run(), expected, strict=True):
        assert_same(after, before)


def test_autocast_and_gradients_work_as_before() -> None:
    network = freeze(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)))
    x = torch.randn(3, 16, requires_grad=True)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            low = network(x.detach())
        (gradient,) = torch.autograd.grad(network(x).sum(), x)
        return low, gradient

    expected = run()
    pack_layers(network)

    for after, before in zip(run(), expected, strict=True):
        assert_same(after, before)


@needs_onednn
def test_bfloat16_stays_the_same() -> None:
    network = freeze(nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 32))).bfloat16()
    x = torch.randn(9, 96).bfloat16()
    expected = network(x)

    # 0 where the CPU has no instructions for it.
    assert pack_layers(network) in (0, 2)

    assert_same(network(x), expected, 1e-2)


def test_empty_batches_and_odd_strides_pass() -> None:
    layer = freeze(nn.Linear(12, 5))
    inputs = [torch.randn(0, 12), torch.randn(12), torch.randn(12, 4).T, torch.randn(3, 2, 12)]
    inputs += [torch.randn(4, 20)[:, 3:15], torch.randn(1, 12).expand(4, 12)]
    expected = [layer(x) for x in inputs]

    pack_layers(layer)

    for x, before in zip(inputs, expected, strict=True):
        assert layer(x).shape == before.shape
        assert torch.allclose(layer(x), before, rtol=0, atol=1e-6)


def test_several_threads_get_the_same(clip: Any) -> None:
    pixels = torch.randn(6, 3, *clip.visual.image_size)
    pack_layers(clip)

    def run(size: int) -> torch.Tensor:
        with torch.inference_mode():
            return clip.visual(pixels[:size])  # type: ignore[no-any-return]

    sizes = [1, 6, 3, 2, 5, 4] * 4
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(run, sizes))

    for size, output in zip(sizes, outputs, strict=True):
        assert_same(output, run(6)[:size])


@needs_onednn
def test_original_weights_are_released(clip: Any) -> None:
    block = clip.transformer.resblocks[0]
    names = ("mlp.c_fc.weight", "attn.in_proj_weight", "attn.out_proj.weight")
    weights = [weakref.ref(block.get_parameter(name)) for name in names]

    pack_layers(clip)
    gc.collect()

    assert [weight() for weight in weights] == [None] * 3
    assert not {name for name, _ in block.named_parameters()} & set(names)


@needs_onednn
def test_weights_can_still_be_read_and_not_be_replaced(clip: Any) -> None:
    block = clip.transformer.resblocks[0]
    expected = [block.mlp.c_fc.weight.clone(), block.attn.in_proj_weight.clone()]
    pack_layers(clip)

    assert clip.transformer.get_cast_dtype() is torch.float32
    assert torch.equal(block.mlp.c_fc.weight, expected[0])
    assert torch.equal(block.attn.in_proj_weight, expected[1])
    with pytest.raises(KeyError, match="already exists"):
        block.mlp.c_fc.weight = nn.Parameter(expected[0])


def test_layers_that_do_not_fit_are_left_alone() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    layers = nn.ModuleDict(
        {
            "subclass": freeze(Doubled(4, 4)),
            "trained": nn.Linear(4, 4).eval(),
            "in training": nn.Linear(4, 4).requires_grad_(False),
            "of another dtype": freeze(nn.Linear(4, 4).double()),
            "elsewhere": freeze(nn.Linear(4, 4, device="meta")),
            "other keys": freeze(nn.MultiheadAttention(4, 2, kdim=6)),
            "more keys": freeze(nn.MultiheadAttention(4, 2, add_bias_kv=True)),
            "normed": freeze(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
            "convolution": freeze(nn.Conv2d(3, 4, 2)),
        }
    )
    types = [type(layer) for layer in layers.values()]

    assert pack_layers(layers) == prepack(layers) == 0
    assert [type(layer) for layer in layers.values()] == types


@needs_onednn
def test_a_layer_in_two_places_is_packed_once() -> None:
    layer = nn.Linear(4, 4)
    network = freeze(nn.Sequential(layer, nn.Tanh(), layer))
    x = torch.randn(3, 4)
    expected = network(x)

    assert pack_layers(network) == 1
    assert pack_layers(network) == 0
    assert_same(network(x), expected)


@pytest.mark.parametrize("missing", REQUIRED)
def test_without_the_operators_nothing_is_packed(
    clip: Any, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fewer:
        def __getattr__(self, name: str) -> Any:
            if name == missing:
                raise AttributeError(name)
            return getattr(mkldnn, name)

    mkldnn = torch.ops.mkldnn
    monkeypatch.setattr(torch.ops, "mkldnn", Fewer())
    prepack_module._is_faster.cache_clear()

    assert_untouched(clip)

    prepack_module._is_faster.cache_clear()


@needs_onednn
@pytest.mark.parametrize("broken", ["raises", "is wrong"])
def test_operators_that_fail_pack_nothing(
    clip: Any, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = onednn.multiply

    def multiply(*args: Any) -> torch.Tensor:
        if broken == "raises":
            raise RuntimeError("could not create a primitive")
        return real(*args) * 1.001

    monkeypatch.setattr(prepack_module, "multiply", multiply)
    prepack_module._is_faster.cache_clear()

    assert_untouched(clip)

    prepack_module._is_faster.cache_clear()


def assert_untouched(network: Any) -> None:
    before = {name: id(weight) for name, weight in network.named_parameters()}
    types = [type(module) for module in network.modules()]

    assert pack_layers(network) == prepack(network) == 0

    assert {name: id(weight) for name, weight in network.named_parameters()} == before
    assert [type(module) for module in network.modules()] == types


@needs_onednn
@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_way_is_chosen(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepack_module, "_is_faster", lambda dtype: faster)
    assert prepack(freeze(nn.Linear(4, 4))) == faster


def test_random_numbers_go_on_as_without_packing(clip: Any) -> None:
    state = torch.get_rng_state()
    prepack_module._is_faster.cache_clear()
    prepack(clip)
    assert torch.equal(torch.get_rng_state(), state)
