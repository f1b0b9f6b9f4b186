import subprocess
import sys

import numpy as np
import pytest
import torch

from csalign.core.errors import ConfigError
from csalign.encoders.base import Embedded, EncoderOptions, load_encoders
from csalign.encoders.running import batch_size_of, embed_by_length, precision_of, ready

OPTIONS = EncoderOptions(torch.device("cpu"))


@pytest.mark.parametrize(
    "spec", ["ViT-B-32", "open_clip:", "", "clip:ViT-B-32", "no.such.module:make", "a b:make", ":x"]
)
def test_what_is_no_spec_brings_the_forms(spec: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_encoders(spec, None, OPTIONS)

    assert spec in str(caught.value)
    assert "use open_clip:ARCH/TAG, open_clip:ARCH+FILE, timm:MODEL" in str(caught.value)


def test_families_of_one_side_refuse_the_other() -> None:
    with pytest.raises(ConfigError, match="timm:test_vit: encodes images only"):
        load_encoders("timm:test_vit", "timm:test_vit", OPTIONS)
    with pytest.raises(ConfigError, match="hf:some/model: encodes texts only"):
        load_encoders("hf:some/model", None, OPTIONS)


def test_no_encoder_is_loaded_where_none_is_named() -> None:
    assert load_encoders(None, None, OPTIONS) == (None, None)


def test_defaults_depend_on_the_device() -> None:
    gpu = EncoderOptions(torch.device("cuda"))

    assert (precision_of(OPTIONS), batch_size_of(OPTIONS)) == ("float32", 32)
    assert (precision_of(gpu), batch_size_of(gpu)) == ("float16", 256)
    own = EncoderOptions(torch.device("cuda"), precision="bfloat16", batch_size=3)
    assert (precision_of(own), batch_size_of(own)) == ("bfloat16", 3)


def test_items_of_like_length_share_a_batch_and_come_back_in_order() -> None:
    lengths = [5, 1, 3, 1, 4]
    batches = []

    def embed(positions: list[int]) -> Embedded:
        batches.append([lengths[position] for position in positions])
        values = np.array(positions, np.float32)[:, None]
        return Embedded(values, list(values[:, None]))

    embeddings, tokens = embed_by_length(lengths, 2, embed)

    assert batches == [[1, 1], [3, 4], [5]]
    assert embeddings.ravel().tolist() == [0, 1, 2, 3, 4]
    assert tokens is not None
    assert [own.item() for own in tokens] == [0, 1, 2, 3, 4]


class Rotary(torch.nn.Module):
    inv_freq: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.rand(4), persistent=False)
        self.linear = torch.nn.Linear(2, 2)


def test_rotary_frequencies_keep_their_precision() -> None:
    network = Rotary()
    frequencies = network.inv_freq.clone()

    ready(network, EncoderOptions(torch.device("cpu"), precision="bfloat16"))

    assert network.linear.weight.dtype is torch.bfloat16
    assert network.inv_freq.dtype is torch.float32
    assert torch.equal(network.inv_freq, frequencies)
    assert not network.training
    assert not network.linear.weight.requires_grad


def test_compiling_takes_the_blocks_or_else_the_whole() -> None:
    options = EncoderOptions(torch.device("cpu"), compile=True)
    block, other = torch.nn.GELU(), torch.nn.GELU()
    stack = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ModuleList([block, other]))
    single = torch.nn.Linear(2, 2)

    ready(stack, options)
    ready(single, options)

    assert block._compiled_call_impl is not None
    assert other._compiled_call_impl is not None
    assert stack._compiled_call_impl is None
    assert single._compiled_call_impl is not None


def test_libraries_are_imported_only_when_named() -> None:
    code = """if True:
        import sys, csalign.encoders.base, csalign.encoders.third_party
        print(*({"timm", "transformers", "open_clip"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    assert done.stdout.strip() == b""
