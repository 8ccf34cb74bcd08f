"""The cache's layout, and the grammar in which a user asks for one."""

import numpy as np
import pytest

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig, KVFormat, LayerLayout, RowFormat, Window
from pascalvl.plugins.model_config import TextConfig


def text_config(head_dim: int = 128, layers: int = 4, value_dims: tuple[int, ...] = ()) -> TextConfig:
    frequencies = tuple(1 / (i + 1) for i in range(head_dim // 2))
    sections = head_dim // 2 - 4, 2, 2
    return TextConfig(
        512, 64, layers, 4, 2, head_dim, 1024, sections, frequencies, 1.0, value_dims or (head_dim,) * layers
    )


# Layout ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value_dim", "size"),
    [
        ("f32", 128, 1024),
        ("f16", 128, 512),
        ("k8v8", 128, 260),
        ("k8v4", 128, 196),
        ("k4v4", 128, 132),
        ("k4v4", 96, 116),
        ("k4v4", 112, 132),  # 56 bytes of values start the next row on a 16-byte boundary: 64
    ],
)
def test_bytes_of_a_token_and_kv_head(name, value_dim, size):
    assert LayerLayout(KVFormat(name), 1, 128, value_dim).bytes_per_token == size
    assert LayerLayout(KVFormat(name), 8, 128, value_dim).bytes_per_token == 8 * size


@pytest.mark.parametrize(
    ("name", "dims", "row_bytes", "row_elements", "rotated"),
    [
        ("f32", (128, 128), (512, 512), (128, 128), False),
        ("f16", (96, 64), (192, 128), (48, 32), False),
        ("k8v8", (128, 112), (128, 112), (32, 28), True),
        ("k8v4", (112, 128), (112, 64), (28, 16), False),
        ("k4v4", (128, 96), (64, 48), (16, 12), True),
    ],
)
def test_rows(name, dims, row_bytes, row_elements, rotated):
    layout = LayerLayout(KVFormat(name), 2, *dims)
    assert (layout.row_bytes, layout.row_elements, layout.is_rotated) == (row_bytes, row_elements, rotated)


def test_types_of_rows():
    f32, *others = RowFormat
    assert f32.dtype == np.float32
    assert all(row_format.dtype == np.int32 for row_format in others)  # halves and codes travel in words
    assert [kv_format.is_quantised for kv_format in KVFormat] == [False, False, True, True, True]


def test_layers_have_their_own_formats_and_dims():
    text = text_config(value_dims=(128, 64, 96, 112))
    config = CacheConfig.parse("k4v4,layer.0-2=k8v8,layer.1=f16")
    found = [(layer.kv_format.value, *layer.dims) for layer in config.layers(text)]
    assert found == [("k8v8", 128, 128), ("f16", 128, 64), ("k8v8", 128, 96), ("k4v4", 128, 112)]
    heads = text.num_key_value_heads
    assert config.bytes_per_token(text) == heads * (260 + (256 + 128) + (128 + 96 + 4) + (64 + 64 + 4))


# Grammar --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "config"),
    [
        *((kv_format.value, CacheConfig(kv_format)) for kv_format in KVFormat),
        ("k8v8,rv=96", CacheConfig(value_rank=96)),
        ("k8v8,rv=auto:0.02", CacheConfig(value_rank=0.02)),
        ("k8v8,rv=auto:0.00001", CacheConfig(value_rank=1e-5)),
        ("f16,window=0+16", CacheConfig(KVFormat.F16, window=Window(0, 16))),
        ("k4v4,window=64+8192,pin=image", CacheConfig(KVFormat.K4V4, window=Window(64, 8192), pin_images=True)),
        (
            "k8v4,rv=96,window=64+8192,pin=image,layer.0-1=f16,layer.3=k8v8",
            CacheConfig(
                KVFormat.K8V4,
                value_rank=96,
                window=Window(64, 8192),
                pin_images=True,
                overrides=((0, 1, KVFormat.F16), (3, 3, KVFormat.K8V8)),
            ),
        ),
    ],
)
def test_what_is_written_is_read_again(text, config):
    assert CacheConfig.parse(text) == config
    assert str(config) == text


def test_order_and_blanks_do_not_matter():
    assert CacheConfig.parse(" k8v4 , layer.2-2=f16, rv=96 ") == CacheConfig.parse("k8v4,rv=96,layer.2=f16")


FORMATS = "expected one of f32, f16, k8v8, k8v4, k4v4."
RANKS = "expected one of 64, 96, 112, 128, or auto:0.01"
WINDOW = "expected first and last tokens, at least 16 of those, as in window=64+8192."


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", FORMATS),
        ("f8", "unknown KV cache format 'f8': " + FORMATS),
        ("k8v4,layer.1=k4v8", FORMATS),
        ("k8v4,rank=64", "unknown KV cache option 'rank=64': expected " + CacheConfig.GRAMMAR),
        ("k8v4,", "unknown KV cache option '': expected FORMAT[,rv=RANK]"),
        ("k8v4,layer.x=f16", "unknown KV cache option 'layer.x=f16'"),
        ("k8v4,layer.3-1=f16", "'layer.3-1=f16' names no layers: expected the first one first."),
        ("k8v4,rv=80", RANKS),
        ("k8v4,rv", RANKS),
        ("k8v4,rv=auto:1.5", RANKS),
        ("k8v4,rv=auto:0.0", RANKS),
        ("k8v4,rv=64,rv=96", "the KV cache option rv is given twice: expected it once."),
        ("k8v4,window=8192", WINDOW),
        ("k8v4,window=4+15", WINDOW),
        ("k8v4,window=-4+64", WINDOW),
        ("k8v4,window=4+64,pin=all", "unknown KV cache option 'pin=all': expected pin=image."),
        ("k8v4,pin=image", "pin=image is for a window, without which all is kept: give one."),
        ("k8v4,rv=" + "9" * 5000, RANKS),
        ("k8v4,layer.0-99999999999=f16", "unknown KV cache option 'layer.0-99999999999=f16'"),
        ("f16" + ",layer.0=f16" * 1000, "is too long: expected 10000 characters at most."),
    ],
)
def test_refusals_name_what_is_expected(text, told):
    with pytest.raises(UserError) as error:
        CacheConfig.parse(text)
    assert told in str(error.value)
    assert len(str(error.value)) < 500


def test_layers_that_a_model_has_not_are_refused():
    with pytest.raises(UserError, match=r"layer\.4 is out of range: this model has layers 0-3\."):
        CacheConfig.parse("k8v4,layer.2-4=f16").layers(text_config())


def test_heads_that_the_formats_are_not_for_are_refused():
    small = text_config(head_dim=32)
    with pytest.raises(UserError, match="k8v4 is for heads of 64, 96, 112, 128; this model has keys of 32 and values"):
        CacheConfig.parse("k8v4").layers(small)
    assert CacheConfig.parse("f16").bytes_per_token(small) == 4 * 2 * 2 * 2 * 32
