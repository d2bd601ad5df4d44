from __future__ import annotations

from flexmla import MLAShape
from flexmla.models import model_shapes


def test_known_models_have_their_shapes():
    by_name = {model.name: model for model in model_shapes()}
    assert by_name["DeepSeek-V3"].shape == MLAShape(128, 1, 512, 64)
    assert by_name["Llama-2-7B-MLA-d_kv_16"].shape == MLAShape(32, 32, 512, 16)
    assert by_name["Kimi-K3 (NoPE)"].shape == MLAShape(96, 1, 512, 0)


def test_options_come_from_the_file():
    by_name = {model.name: model for model in model_shapes()}
    assert {name for name, model in by_name.items() if model.score_scale} == {"Qwen3-0.6B-MLA", "Qwen3-30B-A3B-MLA"}
    assert {name: model.softcap for name, model in by_name.items() if model.softcap} == {"TransMLA gemma-2-9b": 50.0}


def test_names_are_unique():
    names = [model.name for model in model_shapes()]
    assert len(names) == len(set(names)) >= 30
