"""Every configuration key with its type, default and meaning; ``sections.read_section`` checks a section.

docs/CONFIGURATION.md is generated from this file. A type with ``| None`` accepts null; its meaning says what null does.
"""
# ruff: noqa: RUF009 - key() returns a dataclasses.field

from dataclasses import dataclass
from typing import Literal

from minigpt4.common.sections import BUILT_IN_PROCESSORS, TYPE_NAMES, choices_of, key, read_section, type_hints

__all__ = ["BUILT_IN_PROCESSORS", "TYPE_NAMES", "choices_of", "read_section", "type_hints"]

Precision = Literal["fp32", "fp16", "bf16"]
LATER = ("minigpt4", "minigpt_v2")  # archs with the rules of the reference's last commit

_VIT = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth"
_Q_FORMER = _VIT.replace("eva_vit_g", "blip2_pretrained_flant5xxl")
_UNUSED = "Accepted for compatibility; not used."
SPLITS = {"train": "storage", "val": "val_storage", "test": "test_storage"}  # split: its key below build_info


@dataclass(frozen=True)
class VitConfig:
    """Architecture of the vision tower; the defaults are those of EVA-ViT-g/14."""

    patch_size: int = key(14, "Side of a patch in pixels.", least=1)
    embed_dim: int = key(1408, "Width of the tokens.", least=1)
    depth: int = key(39, "Number of blocks.", least=1)
    num_heads: int = key(16, "Number of attention heads.", least=1)
    mlp_ratio: float = key(4.3637, "Width of the MLP as a multiple of `embed_dim`.")


@dataclass(frozen=True)
class QFormerSettings:
    """Architecture of the Q-Former; the defaults are those of BERT-base."""

    hidden_size: int = key(768, "Width of the queries.", least=1)
    num_hidden_layers: int = key(12, "Number of layers.", least=1)
    num_attention_heads: int = key(12, "Number of attention heads.", least=1)
    intermediate_size: int = key(3072, "Width of the feed-forward layers.", least=1)
    cross_attention_freq: int = key(2, "Every n-th layer, from the first, attends to the image tokens.", least=1)


@dataclass(frozen=True)
class ModelConfig:
    """The model: architecture, weights, precision and prompts."""

    arch: str = key("mini_gpt4", "Registered model: `mini_gpt4`, or `minigpt4` and `minigpt_v2` of the later family.")
    model_type: str = key("pretrain_vicuna", "Selects the default YAML.")
    image_size: int = key(224, "Side of the square input image in pixels.", least=1)
    drop_path_rate: float = key(0.0, "Stochastic depth of the vision tower where it is trained.", below=1)
    use_grad_checkpoint: bool = key(False, "Gradient checkpointing of the vision tower where it is trained.")
    vit_model: Literal["eva_clip_g"] = key("eva_clip_g", "Vision tower.")
    vit_precision: Precision = key("fp16", "Precision of the frozen vision tower's weights.")
    vit_config: VitConfig = key(VitConfig, "Another size of the vision tower.")
    vit_weights: str = key(_VIT, "Vision tower: file, folder, URL or Hugging Face id.")
    freeze_vit: bool = key(True, "Keep the vision tower and `ln_vision` frozen.")
    freeze_qformer: bool = key(True, "Keep the Q-Former and its queries frozen.")
    has_qformer: bool | None = key(
        None, "False: four patches in a row are an image embedding; null: True, for arch `minigpt_v2` False."
    )
    num_query_token: int = key(32, "Number of queries, which is the number of image embeddings.", least=1)
    q_former_model: str = key(_Q_FORMER, "Q-Former and queries: path, URL or Hugging Face id.")
    qformer_config: QFormerSettings = key(QFormerSettings, "Another size of the Q-Former.")
    llama_model: str = key("/path/to/vicuna/weights/", "Language model: folder or Hugging Face id.")
    llm_dtype: Precision | None = key(None, "Precision of the language model; null: the best of the device.")
    llm_precision: Literal["half", "int8", "nf4"] = key(
        "half", "Weights of the language model's layers: `half`, `int8`, or `nf4`, 4 bits through bitsandbytes."
    )
    llm_grad_checkpoint: bool = key(False, "Gradient checkpointing of the language model: less memory, more time.")
    use_grad_checkpoint_llm: bool = key(False, "The reference's name for `llm_grad_checkpoint`.")
    low_resource: bool = key(False, "The reference's name for `llm_precision: int8`.")
    device_8bit: int = key(0, _UNUSED)
    conversation: str | None = key(None, "Chat template by name; null: the one that fits the prompts or the tokenizer.")
    prompt: str = key("", _UNUSED)
    prompt_path: str | None = key(None, "Text file of training prompts, one a line; null: captions without prompt.")
    prompt_template: str = key("", "Text with one `{}` for the prompt, such as `'###Human: {} ###Assistant: '`.")
    max_txt_len: int = key(32, "Captions are truncated to this number of tokens, `end_sym` included.", least=1)
    end_sym: str = key("\n", "Text that ends a caption; generation stops at it.")
    ckpt: str | None = key(None, "MiniGPT-4 checkpoint: file, URL or Hugging Face id; null: a new projection.")
    lora_r: int = key(0, "Rank of LoRA weights, which are trained beside the frozen language model; 0: no LoRA.")
    lora_alpha: int = key(16, "LoRA's update is scaled by `lora_alpha` / `lora_r`.", least=1)
    lora_dropout: float = key(0.05, "Dropout on the input of the LoRA weights in training.", below=1)
    lora_target_modules: list[str] = key(["q_proj", "v_proj"], "Linear layers of the decoder that get LoRA weights.")
    chat_template: bool = key(False, "Put the instructions of samples into `prompt_template`.")
    max_context_len: int = key(3800, "Conversations are cut to this number of tokens, images included.", least=1)

    def __post_init__(self) -> None:
        is_v2 = self.arch == "minigpt_v2"
        object.__setattr__(self, "llm_grad_checkpoint", self.llm_grad_checkpoint or self.use_grad_checkpoint_llm)
        if self.has_qformer is None:
            object.__setattr__(self, "has_qformer", not is_v2)
        if is_v2 and not self.prompt_template:
            object.__setattr__(self, "prompt_template", "[INST] {} [/INST]")

    @property
    def quantization(self) -> str | None:
        """The kind of quantised layers that the language model should have; None for half precision."""
        kind = "int8" if self.low_resource and self.llm_precision == "half" else self.llm_precision
        return None if kind == "half" else kind


@dataclass(frozen=True)
class PartOptim:
    """How a trained part of the model is optimised."""

    lr: float | None = key(None, "Learning rate in place of `run.init_lr`, on the same schedule; null: `run.init_lr`.")
    weight_decay: float | None = key(None, "Weight decay of this part; null: `run.weight_decay`.")
    freeze: bool = key(False, "Keep this part frozen.")


@dataclass(frozen=True)
class VitOptim(PartOptim):
    """The same for the vision tower, whose blocks may have different rates."""

    layer_decay: float = key(1.0, "Factor of the learning rate from each block to the one before it.")


@dataclass(frozen=True)
class OptimConfig:
    """Settings for parts of the model."""

    llama_proj: PartOptim = key(PartOptim, "The projection.")
    lora: PartOptim = key(PartOptim, "LoRA weights, with `model.lora_r`.")
    Qformer: PartOptim = key(PartOptim, "The Q-Former, with `model.freeze_qformer: False`.")
    query_tokens: PartOptim = key(PartOptim, "Its queries, with `model.freeze_qformer: False`.")
    visual_encoder: VitOptim = key(VitOptim, "Vision tower and `ln_vision`, with `model.freeze_vit: False`.")


@dataclass(frozen=True)
class RunConfig:
    """The run: task, optimizer and schedule, batches, device, output."""

    task: str = key("image_text_pretrain", "Registered task.")
    runner: str = key("runner_base", "Registered runner.")
    lr_sched: str = key("linear_warmup_cosine_lr", "Registered learning-rate schedule.")
    init_lr: float = key(1e-4, "Learning rate at the end of the warm-up.")
    min_lr: float = key(0.0, "Lowest learning rate of the decay.")
    warmup_lr: float = key(-1.0, "Learning rate at the first step; negative: `init_lr`.", least=-1)
    warmup_steps: int = key(0, "Steps of linear warm-up, counted over epochs.")
    lr_decay_rate: float | None = key(None, "Factor per epoch of `linear_warmup_step_lr`; null: 1.")
    weight_decay: float = key(0.05, "AdamW's weight decay; biases and norms have none.")
    optim: OptimConfig = key(OptimConfig, "Other rates, weight decays and freezing for parts of the model.")
    beta2: float = key(0.999, "AdamW's second beta.", below=1)
    max_epoch: int = key(1, "Number of epochs.")
    iters_per_epoch: int | None = key(None, "Iterations per epoch; null: one pass; shards need a number.", least=1)
    batch_size_train: int | None = key(None, "Samples per iteration and process; null: data set's, or 1.", least=1)
    batch_size_eval: int = key(1, "Samples per batch and process in validation.", least=1)
    num_workers: int = key(0, "Loader processes for each training process; 0: the training process loads.")
    accum_grad_iters: int = key(1, "Iterations whose gradients are averaged into one update.", least=1)
    clip_grad_norm: float | None = key(None, "Largest norm of the gradient; null or 0: not clipped.")
    max_nonfinite: int = key(20, "Updates in a row that may be skipped because of a non-finite loss.", least=1)
    seed: int = key(42, "Seed of all random numbers; the rank is added.")
    output_dir: str = key("output", "Each run writes a new folder below this one.")
    amp: bool = key(False, "Automatic mixed precision.")
    amp_dtype: Precision | None = key(None, "Precision of `amp`; null: the best of the device.")
    resume_ckpt_path: str | None = key(None, "Checkpoint to resume from; null: none.")
    resume: Literal["auto"] | None = key(None, "`auto`: resume from the newest checkpoint of `output_dir`; null: no.")
    compile: bool = key(False, "Compile the model's layers where the device gains from it.")
    feature_cache: str | None = key(None, "Folder for the outputs of the frozen vision side; null: no cache.")
    feature_crops: int = key(1, "Random crops per image in the feature cache.", least=1)
    save_every_iters: int | None = key(None, "Steps between checkpoints; null or 0: only after each epoch.")
    keep_last: int | None = key(None, "Number of checkpoints to keep, by step, beside the best; null: all.", least=1)
    parallel: Literal["ddp", "fsdp"] = key("ddp", "`fsdp` shards the language model over the processes.")
    dist_timeout: float = key(1800.0, "Seconds that processes wait for each other.")
    device: str = key("auto", "`auto`, `npu`, `cuda`, `mps` or `cpu`; the best available one if it is missing.")
    strict_device: bool = key(False, "A missing device is an error.")
    evaluate: bool = key(False, "Evaluate `valid_splits` and `test_splits` only, without training.")
    train_splits: list[str] = key(["train"], "Splits to train on.")
    valid_splits: list[str] = key([], "Splits to validate on after each epoch, e.g. `[val]`; they select the best.")
    test_splits: list[str] = key([], "Splits whose loss is also measured after each epoch.")
    log_freq: int = key(50, "Iterations between log lines.", least=1)
    tracker: Literal["tensorboard", "wandb"] | None = key(None, "Experiment tracker; null: none.")
    wandb_log: bool = key(False, "The later reference's name for `tracker: wandb`.")
    name: str = key("", _UNUSED)
    save_path: str | None = key(None, "Folder of evaluate.py's answers and results; null: below output/evaluation.")
    job_name: str = key("", "Name of the run in wandb; empty: the name of its folder.")
    world_size: int = key(1, _UNUSED + " torchrun sets the number of processes.")
    dist_url: str = key("env://", "Where processes meet; torchrun sets the environment for `env://`.")
    distributed: bool = key(True, _UNUSED + " torchrun starts several processes.")


@dataclass(frozen=True)
class ImageProcessorConfig:
    """An image processor. Keys of processors that are not built in are not checked."""

    name: str = key("blip2_image_train", "Registered image processor.")
    image_size: int = key(224, "Side of the square result in pixels; equals `model.image_size`.", least=1)
    min_scale: float = key(0.5, "Smallest share of the area that a random crop keeps.")
    max_scale: float = key(1.0, "Largest share of the area that a random crop keeps.")
    mean: list[float] | None = key(None, "Mean of each channel, from 0 to 1; null: CLIP's.")
    std: list[float] | None = key(None, "Standard deviation of each channel, from 0 to 1; null: CLIP's.")
    draft: bool = key(False, "Decode large JPEGs at 1/2, 1/4 or 1/8 size: faster, slightly different pixels.")


@dataclass(frozen=True)
class EvalImageProcessorConfig(ImageProcessorConfig):
    """The image processor of validation and chat."""

    name: str = key("blip2_image_eval", "Registered image processor.")


@dataclass(frozen=True)
class ImageProcessors:
    """Image processors by split."""

    train: ImageProcessorConfig = key(ImageProcessorConfig, "For training.")
    eval: EvalImageProcessorConfig | None = key(None, "For validation and chat; null: `blip2_image_eval` of that size.")


@dataclass(frozen=True)
class TextProcessorConfig:
    """A caption processor. Keys of processors that are not built in are not checked."""

    name: str = key("blip_caption", "Registered text processor.")
    prompt: str = key("", "Text before each caption.")
    max_words: int = key(50, "Captions are cut to this number of words.", least=1)


@dataclass(frozen=True)
class TextProcessors:
    """Caption processors by split."""

    train: TextProcessorConfig = key(TextProcessorConfig, "For training.")
    eval: TextProcessorConfig | None = key(None, "For validation; null: as for training.")


@dataclass(frozen=True)
class AnnotationFiles:
    """Annotation files of a split."""

    storage: str | list[str] = key("", "Files.")
    url: str | list[str] = key("", "Where the files are published; nothing is downloaded.")
    md5: str | list[str] = key("", _UNUSED)


@dataclass(frozen=True)
class Annotations:
    """Annotation files by split."""

    train: AnnotationFiles = key(AnnotationFiles, "For training.")


@dataclass(frozen=True)
class ImageFolder:
    """Where images are."""

    storage: str = key("", "Folder of the images.")


@dataclass(frozen=True)
class BuildInfo:
    """Where the data of each split are; dataset/README_MINIGPT_V2.md lists the keys of the data sets of MiniGPT-v2."""

    storage: str | list[str] | None = key(None, "Training data: folder, list, table or shards; null: no such split.")
    val_storage: str | list[str] | None = key(None, "Data of the split `val`; null: no such split.")
    test_storage: str | list[str] | None = key(None, "Data of the split `test`; null: no such split.")
    image_root: str | None = key(None, "Folder to which the image paths of a list are relative; null: the list's.")
    shuffle_buffer: int = key(1000, "Samples of shards among which each worker draws.")
    timeout: float = key(30.0, "Seconds without data after which the fetching of a shard has failed.", least=1)
    retries: int = key(
        5, "Further attempts at a URL of http(s) without new data, after 1, 2, 4, … seconds (at most 60)."
    )
    image_path: str = key("", "MiniGPT-v2: folder of the images.")
    ann_path: str = key("", "MiniGPT-v2: annotation file; of RefCOCO, the folder with refcoco, refcoco+ and refcocog.")
    data_dir: str = key("", "Visual Genome: folder of image_data.json, region_descriptions.json and the images.")
    dataset: str = key("", "RefCOCO: folder below `ann_path`; `inv` at its beginning is ignored.")
    splitBy: str = key("", "RefCOCO: who made the splits; the file is refs(SPLITBY).p.")
    annotations: Annotations = key(Annotations, "MiniGPT-v2: annotation files of data sets of LAVIS.")
    images: ImageFolder = key(ImageFolder, "MiniGPT-v2: images of data sets of LAVIS.")

    def has_split(self, split: str) -> bool:
        """Whether a place is given for the data of one of ``SPLITS``."""
        places = (self.ann_path, self.data_dir, self.annotations.train.storage) if split == "train" else ()
        return any((getattr(self, SPLITS[split]), *places))


@dataclass(frozen=True)
class DatasetConfig:
    """A data set. Unknown keys of builders that are not built in are not checked."""

    builder: str | None = key(None, "Registered builder, such as `image_text`; null: the one of the section's name.")
    type: str = key("default", "Selects the builder's default YAML.")
    data_type: str = key("images", _UNUSED)
    build_info: BuildInfo = key(BuildInfo, "Where the data are.")
    vis_processor: ImageProcessors = key(ImageProcessors, "Image processors.")
    text_processor: TextProcessors = key(TextProcessors, "Caption processors.")
    sample_ratio: float | Literal["size"] | None = key(
        None, "Share of the batches relative to other data sets; `size`: its number of samples; null: 1."
    )
    batch_size: int | None = key(None, "Samples per iteration where `run.batch_size_train` is null; null: 1.", least=1)
