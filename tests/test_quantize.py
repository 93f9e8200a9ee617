"""Matrices of 8 or 4 bits: what is asked of diffusers, and what is refused. The products themselves need a
GPU."""
import importlib.metadata

import diffusers
import pytest
import torch
import transformers

from ddpo_nb import loading as L
from ddpo_nb.loading import ModelError, is_quantized, load_pipeline, quantization, quantized_parts
from ddpo_nb.speed import brought
from ddpo_nb.tiny import tiny_pipeline

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("sd3")
    tiny_pipeline("sd3").save_pretrained(place)
    return str(place)

@pytest.fixture
def gpu(monkeypatch):
    "A machine that says that it has a GPU and bitsandbytes"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a: True)
    monkeypatch.setattr(L, "find_spec", lambda name: name)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda o: "0.50" if o == "bitsandbytes" else real(o))

def refused(problem, *args, **kwargs):
    with pytest.raises(ModelError, match=problem) as e: load_pipeline(*args, **kwargs)
    assert "\n" not in str(e.value)

def test_what_cannot_be_quantized_is_refused_in_one_line(folder, gpu, monkeypatch):
    refused("there is no 'int3'; choose from int8, nf4", folder, quantize="int3")
    refused("only a folder in diffusers' format", "emoji-sd", quantize="nf4")
    refused("a LoRA to begin with goes into whole weights", folder, lora=folder, quantize="nf4")
    monkeypatch.setattr(L, "find_spec", lambda name: None)
    refused("bitsandbytes is not installed; pip install bitsandbytes", folder, quantize="int8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("it needs a CUDA GPU, and there is none", folder, quantize="int8")

def test_the_network_and_t5_are_taken_and_nothing_else():
    parts = dict(
        vae="AutoencoderKL", text_encoder="CLIPTextModelWithProjection", text_encoder_3="T5EncoderModel",
        transformer="SD3Transformer2DModel", tokenizer_3="T5TokenizerFast")
    assert quantized_parts(parts) == ("text_encoder_3", "transformer")
    classes = dict(unet=diffusers.UNet2DConditionModel, vae=diffusers.AutoencoderKL)
    assert quantized_parts(classes) == ("unet",)

def test_each_library_gets_its_own_words(gpu):
    parts = dict(transformer="FluxTransformer2DModel", text_encoder_2="T5EncoderModel")
    for kind in ("int8", "nf4"):
        asked = quantization(kind, parts).quant_mapping
        assert type(asked["transformer"]) is diffusers.BitsAndBytesConfig
        assert type(asked["text_encoder_2"]) is transformers.BitsAndBytesConfig
        for o in asked.values():
            assert (o.load_in_8bit, o.load_in_4bit) == (kind == "int8", kind == "nf4")
            if kind == "nf4":
                assert (o.bnb_4bit_quant_type, o.bnb_4bit_use_double_quant) == ("nf4", True)
                assert o.bnb_4bit_compute_dtype == torch.bfloat16

def test_diffusers_is_asked_for_it(folder, gpu, monkeypatch):
    "And what comes back keeps its matrices: the rest of the pipeline alone is cast"
    asked = {}
    def loaded(kind, model, revision, variant, **parts):
        asked.update(parts)
        pipe = tiny_pipeline("sd3")
        pipe.transformer.half().is_quantized = True
        return pipe
    monkeypatch.setattr(L, "_from_parts", loaded)
    pipe = load_pipeline(folder, quantize="nf4", dtype=torch.bfloat16)
    assert {*asked["quantization_config"].quant_mapping} == {"transformer", "text_encoder_3"}
    assert is_quantized(pipe.transformer) and pipe.transformer.dtype == torch.float16
    assert not is_quantized(pipe.vae) and pipe.vae.dtype == torch.bfloat16

def test_parts_that_are_brought_go_home_again_whatever_happens():
    class Part(torch.nn.Linear):
        def to(self, device): self.seen = [*getattr(self, "seen", []), str(device)]; return self
    here, there = Part(1, 1, device="meta"), Part(1, 1)
    with pytest.raises(KeyError):
        with brought([here, there], "meta"): raise KeyError
    assert there.seen == ["meta", "cpu"] and not hasattr(here, "seen")
