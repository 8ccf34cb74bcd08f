import pytest

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.weight_format import WeightConfig, WeightFormat


@pytest.mark.parametrize(
    "text", ["f32", "w8", "w4", "w4,group=64", "w4,lm_head=f16,vision=w4", "w8,group=32,layer.0-1=f32,layer.3=w4"]
)
def test_text_comes_back(text):
    assert str(WeightConfig.parse(text)) == text


def test_defaults():
    config = WeightConfig.parse("w4,group=64,layer.1=w8")
    assert config.layers(3) == (WeightFormat(4, 64), WeightFormat(8, 64), WeightFormat(4, 64))
    assert config.lm_head == config.vision == WeightFormat(8, 64)
    assert WeightConfig.parse("f16").lm_head == WeightFormat(16)
    assert not WeightConfig().is_quantised
    assert WeightConfig.parse("f32,vision=w8").is_quantised


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w5", "unknown weight format 'w5': expected one of f32, f16, w8, w4"),
        ("w4,group=48", "'group=48' is out of range"),
        ("w4,head=w8", "unknown weight option 'head=w8': expected FORMAT"),
        ("w4,lm_head=8", "unknown weight format '8'"),
        ("w4,vision=w8,vision=w8", "vision is given twice"),
        ("w4,layer.3-1=w8", "names no layers"),
        ("w4,group=" + "9" * 5000, "^the weight option 'group=9{1,100}… is out of range"),
        ("w4,layer.0-99999999999=w8", "unknown weight option 'layer.0-99999999999=w8'"),
        ("w4" + ",layer.0=w8" * 1000, "are too long: expected 10000 characters at most"),
    ],
)
def test_errors(text, message):
    with pytest.raises(UserError, match=message):
        WeightConfig.parse(text)


def test_layers_out_of_range():
    with pytest.raises(UserError, match=r"layer\.6 is out of range: this model has layers 0-5"):
        WeightConfig.parse("w4,layer.2-6=w8").layers(6)


def test_bytes():
    assert WeightFormat(4).nbytes(10, 130) == 10 * 128 + 2 * 2 * 16
    assert WeightFormat(16).nbytes(3, 9) == 2 * 3 * 16
    assert WeightFormat(32).nbytes(3, 9) == 4 * 3 * 12
