"""Small random language models of the architectures that are named as supported, as folders on the disk."""

import json
import shutil

import torch
from golden_data import TINY
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
OWN_ATTENTION_WEIGHTS = ("gpt2", "opt")  # transformers does not pass the request for weights on to attention
ARCHITECTURES = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2.5 with windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 6, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {"sliding_window": 6, "query_pre_attn_scalar": 8}),
    "phi3": ("phi3", {"sliding_window": 6}),
    "smollm3": ("smollm3", {}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "activation_function": "gelu"}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "granite": ("granite", {"logits_scaling": 4.0}),
}


def write_language_model(folder, name, **changes):
    """Writes config.json, weights and the tiny tokenizer of a random model; returns the folder."""
    kind, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | settings | changes))
    llm = AutoModelForCausalLM.from_config(config)
    for parameter in llm.parameters():  # norms and biases would be ones and zeros, and attention nearly uniform
        parameter.data = parameter.data * 2 + 0.05 * torch.randn_like(parameter)
    llm.save_pretrained(folder)
    for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TINY / "llama" / file, folder / file)
    assert json.loads((folder / "config.json").read_text())["model_type"] == kind
    return folder
