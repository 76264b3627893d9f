"""Tiny models of several modalities around a language model, and a prompt with an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.conftest import TINY

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

IMAGE = 290
TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "patch_size": 4}
SIGHT = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT | {"sliding_window": 16},
        "vision_config": TOWER | SIGHT | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        "boi_token_index": 291,
        "eoi_token_index": 292,
    },
    "qwen3_5": {
        "text_config": TEXT | TINY["qwen3_5_text"],
        "vision_config": TOWER
        | {"depth": 2, "num_heads": 2, "temporal_patch_size": 1, "num_position_embeddings": 16}
        | {"out_hidden_size": 32},
        "image_token_id": IMAGE,
        "video_token_id": 293,
        "vision_start_token_id": 291,
        "vision_end_token_id": 292,
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": TOWER | SIGHT | {"model_type": "pixtral", "head_dim": 8},
        "image_token_index": IMAGE,
        "spatial_merge_size": 2,
    },
}

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CONFIGS["qwen3_5_moe"] = CONFIGS["qwen3_5"] | {
    "text_config": CONFIGS["qwen3_5"]["text_config"]
    | EXPERTS
    | {"shared_expert_intermediate_size": 16}
}
CONFIGS["llama4"] = {
    "text_config": TEXT
    | {"moe_layers": [0, 2], "num_local_experts": 6, "intermediate_size_mlp": 48}
    | {"intermediate_size": 24, "attention_chunk_size": 16},
    "vision_config": TOWER
    | SIGHT
    | {"intermediate_size": 64, "projector_input_dim": 24, "projector_output_dim": 24}
    | {"vision_output_dim": 24},
    "image_token_index": IMAGE,
    "boi_token_index": 291,
    "eoi_token_index": 292,
}


def wrapper(name: str) -> PreTrainedModel:
    """A new model: all parameters random, norms and biases too."""
    import torch
    import transformers

    from nuteprune.model.lookup import WRAPPERS

    config = transformers.CONFIG_MAPPING[name](**CONFIGS[name])
    model = getattr(transformers, WRAPPERS[name].conditional)(config).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            near = 1.0 if "norm" in path and path.endswith("weight") else 0.0
            parameter.copy_(near + 0.2 * torch.randn(parameter.shape, generator=random))
    return model


def inputs(name: str) -> dict[str, Tensor]:
    """A prompt with an image of 16 x 16 in it, of four tokens."""
    import torch

    random = torch.Generator().manual_seed(2)
    ids = torch.tensor([[5, 9, IMAGE, IMAGE, IMAGE, IMAGE, 7, 8, 30]])
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name.startswith("qwen3_5"):
        patches = torch.randn(16, 3 * 4 * 4, generator=random)
        kinds = (ids == IMAGE).int()
        grid = torch.tensor([[1, 4, 4]])
        return found | {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    found["pixel_values"] = torch.randn(1, 3, 16, 16, generator=random)
    if name == "mistral3":
        found["image_sizes"] = torch.tensor([[16, 16]])
    return found
