"""Llama 2 and 3: the plain decoder that the other families are described against."""

from tilefleet_worker.families.family import Family

LLAMA = Family("Llama 2, 3", ("LlamaForCausalLM",), {"rms_norm_eps": 1e-6, "rope_theta": 1e4})
