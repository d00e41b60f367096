"""Tiny random models of `transformers`, saved as checkpoints, for the parity tests of imports."""

import warnings

WIDTH, VOCAB = 32, 64
BODY = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 6,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 6,
    "v_head_dim": 5,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 10,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 40.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "short_mscale": 1.1,
    "long_mscale": 1.3,
}

# Family -> the name of its classes, what all of its cases share, and the cases.
CASES = {
    "deepseek_v2": (
        "DeepseekV2",
        LATENT | {"n_group": 1, "topk_group": 1},
        {
            "greedy": {},
            "no query latent, tied, all layers sparse": {
                "q_lora_rank": None,
                "tie_word_embeddings": True,
                "first_k_dense_replace": 0,
            },
            "groups, scaled": {
                "topk_method": "group_limited_greedy",
                "n_group": 4,
                "topk_group": 2,
                "routed_scaling_factor": 16.0,
                "n_shared_experts": 1,
                "first_k_dense_replace": 2,
            },
            "all layers dense": {"first_k_dense_replace": 5},
            "yarn as published": {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
            "yarn of two magnitudes": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
            "plain yarn, heads wider than the model": {
                "rope_parameters": YARN,
                "qk_nope_head_dim": 20,
                "v_head_dim": 24,
                "rms_norm_eps": 1e-5,
            },
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        LATENT | {"n_group": 4, "topk_group": 2},
        {
            "groups": {},
            "no groups, no query latent, unscaled": {
                "n_group": 1,
                "topk_group": 1,
                "q_lora_rank": None,
                "routed_scaling_factor": 1.0,
            },
            "not renormalised, tied": {"norm_topk_prob": False, "tie_word_embeddings": True},
            "yarn as published": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
            "width that heads do not divide": {"hidden_size": 30, "first_k_dense_replace": 0},
        },
    ),
    "llama": (
        "Llama",
        {},
        {
            "plain": {},
            "tied": {"tie_word_embeddings": True},
            "multi-query": {"num_key_value_heads": 1},
            "head width": {"head_dim": 12},
            "llama3 rotary": {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500.0,
                    "factor": 4.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
            "linear rotary": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
            "biases": {"attention_bias": True},
        },
    ),
    "mixtral": (
        "Mixtral",
        EXPERTS,
        {
            "plain": {},
            "window": {"sliding_window": 5},
            "tied, one choice": {"tie_word_embeddings": True, "num_experts_per_tok": 1},
            "multi-query, head width": {"num_key_value_heads": 1, "head_dim": 12},
        },
    ),
    "qwen3": (
        "Qwen3",
        {"head_dim": 12},
        {
            "plain": {"use_sliding_window": False, "sliding_window": 5},
            "tied, biases": {"tie_word_embeddings": True, "attention_bias": True},
            "last layers windowed": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
            "yarn": {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 500.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 10, "head_dim": 12},
        {
            "plain": {},
            "renormalised, tied": {"norm_topk_prob": True, "tie_word_embeddings": True, "num_experts_per_tok": 3},
            "every other layer sparse, window": {
                "decoder_sparse_step": 2,
                "use_sliding_window": True,
                "sliding_window": 5,
            },
            "dense layers by name, biases": {"mlp_only_layers": [0, 2], "attention_bias": True, "norm_topk_prob": True},
        },
    ),
    "olmoe": (
        "Olmoe",
        {"num_experts": 6, "num_experts_per_tok": 2, "eos_token_id": 2},
        {
            "plain": {},
            "renormalised, all heads alike": {"norm_topk_prob": True, "num_key_value_heads": 4},
            "clipped, biases": {"clip_qkv": 0.4, "attention_bias": True},
        },
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 10,
            "shared_expert_intermediate_size": 14,
        },
        {
            "plain": {},
            "renormalised, tied, no biases": {"norm_topk_prob": True, "tie_word_embeddings": True, "qkv_bias": False},
            "windows, dense layers": {
                "use_sliding_window": True,
                "sliding_window": 5,
                "max_window_layers": 2,
                "mlp_only_layers": [1],
            },
        },
    ),
    "granitemoe": (
        "GraniteMoe",
        EXPERTS,
        {
            "plain": {},
            "multipliers, tied": {
                "embedding_multiplier": 12.0,
                "attention_multiplier": 0.4,
                "residual_multiplier": 0.22,
                "logits_scaling": 6.0,
                "tie_word_embeddings": True,
            },
            "biases, head width, one choice": {
                "attention_bias": True,
                "head_dim": 12,
                "num_experts_per_tok": 1,
                "attention_multiplier": 0.3,
            },
        },
    ),
    "gpt_oss": (
        "GptOss",
        EXPERTS | {"head_dim": 8, "sliding_window": 5},
        {
            "plain": {},
            "no biases, one window, tied": {
                "attention_bias": False,
                "layer_types": ["full_attention", "full_attention", "sliding_attention"],
                "tie_word_embeddings": True,
            },
            "narrow clamps, plain rotary": {
                "swiglu_limit": 0.3,
                "swiglu_alpha": 1.2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            },
            "packed widths": {"intermediate_size": 32, "num_key_value_heads": 1, "num_experts_per_tok": 4},
        },
    ),
    "phimoe": (
        "Phimoe",
        EXPERTS,
        {
            "plain": {},
            "biases, wide jitter, window": {
                "attention_bias": True,
                "lm_head_bias": True,
                "router_jitter_noise": 0.3,
                "sliding_window": 5,
            },
            "short longrope": {"original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
            "long longrope": {
                "original_max_position_embeddings": 8,
                "rope_parameters": LONGROPE | {"long_factor": LONGROPE["short_factor"]},
            },
        },
    ),
}
ALL = [(family, case) for family, (_, _, cases) in CASES.items() for case in cases]


def tiny_model(family, case):
    """A tiny random model of `transformers` in evaluation mode, its norms and biases not at their start."""
    import torch
    import transformers

    name, shared, cases = CASES[family]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{name}Config")(**BODY | shared | cases[case])
        config._attn_implementation, config._experts_implementation = "eager", "eager"
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in key or not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                tensor.add_(0.3 * noise)
            else:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
    return model
