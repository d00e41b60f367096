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
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# Family -> the name of its classes, what all of its cases share, and the cases.
CASES = {
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
