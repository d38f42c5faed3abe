import pytest

from stages.generation.vllm_worker import require_whole_layers

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"], "out": ["out"]}
QKV = [f"model.layers.3.self_attn.{part}_proj.weight" for part in "qkv"]


def test_whole_layers_and_those_that_stand_alone_may_be_loaded() -> None:
    require_whole_layers([], FUSED)
    require_whole_layers([*QKV, "model.norm.weight", "layers.0.mlp.up_proj.b", "layers.0.mlp.gate_proj.b"], FUSED)


@pytest.mark.parametrize("missing", QKV)
def test_a_part_of_a_fused_layer_is_refused(missing: str) -> None:
    others = [f"model.layers.2.self_attn.{part}_proj.weight" for part in "qkv"]

    with pytest.raises(ValueError, match=rf"is to be loaded without {missing}, with which it forms one layer"):
        require_whole_layers([name for name in QKV if name != missing] + others, FUSED)
