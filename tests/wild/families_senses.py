"""transformers: models of images, of sound, and of both with text."""

from typing import Any

import torch
import transformers as hf
from entry import Entry
from families_text import SIZES, TEXT, VOCABULARY, WIDTH, loss_and_logits
from torch import Tensor, nn

DETR = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
VISION = SIZES | {"image_size": 32, "patch_size": 8, "num_labels": 4}


def images() -> dict[str, Tensor]:
    """Images of one of four classes."""
    return {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.randint(4, (2,))}


def segmented() -> dict[str, Tensor]:
    """Images with a class at each pixel."""
    return {"pixel_values": torch.randn(2, 3, 64, 64), "labels": torch.randint(4, (2, 64, 64))}


def speech() -> dict[str, Tensor]:
    """Spectrograms and what is said."""
    return {"input_features": torch.randn(2, 16, 64), "labels": torch.randint(3, VOCABULARY, (2, 8))}


def waves() -> dict[str, Tensor]:
    """Sound and what is said."""
    return {"input_values": torch.randn(2, 1600), "labels": torch.randint(3, VOCABULARY, (2, 3))}


def captioned() -> dict[str, Tensor]:
    """Images and their captions."""
    return {"pixel_values": torch.randn(3, 3, 32, 32), "input_ids": torch.randint(3, VOCABULARY, (3, 8))}


def boxed() -> dict[str, Any]:
    """Images with one box in each."""
    boxes = [{"class_labels": torch.randint(3, (1,)), "boxes": 0.3 + 0.2 * torch.rand(1, 4)} for _ in range(2)]
    return {"pixel_values": torch.randn(2, 3, 64, 64), "labels": boxes}


def contrastive(net: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """The loss of images and captions that belong together."""
    result = net(**batch, return_loss=True)
    return result.loss, result.logits_per_image


def clip() -> nn.Module:
    """CLIP, of two transformers."""
    vision = SIZES | {"image_size": 32, "patch_size": 8}
    text = TEXT | {"bos_token_id": 1, "eos_token_id": 2}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def detr() -> nn.Module:
    """DETR, of a small ResNet and a transformer."""
    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in DETR.items()}
    return hf.DetrForObjectDetection(
        hf.DetrConfig(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=backbone,
            d_model=WIDTH,
            num_queries=6,
            num_labels=3,
            **sizes,
        )
    )


def whisper() -> nn.Module:
    """Whisper, from 64 frames of 16 bands."""
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=VOCABULARY,
            num_mel_bins=16,
            d_model=WIDTH,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_source_positions=32,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )


def wav2vec2() -> nn.Module:
    """wav2vec 2.0 with a CTC loss, without its random masks of time."""
    return hf.Wav2Vec2ForCTC(
        hf.Wav2Vec2Config(
            **SIZES,
            vocab_size=VOCABULARY,
            conv_dim=(16, 16, 16),
            conv_stride=(5, 4, 4),
            conv_kernel=(10, 8, 4),
            num_feat_extract_layers=3,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            mask_time_prob=0.0,
            layerdrop=0.0,
            ctc_zero_infinity=True,
            pad_token_id=0,
        )
    )


def segformer() -> nn.Module:
    """SegFormer, two stages."""
    return hf.SegformerForSemanticSegmentation(
        hf.SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[2, 4],
            mlp_ratios=[2, 2],
            decoder_hidden_size=32,
            num_labels=4,
        )
    )


def convnext(kind: str) -> nn.Module:
    """ConvNeXt or its second version, four stages."""
    config = getattr(hf, f"{kind}Config")(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], num_labels=4)
    return getattr(hf, f"{kind}ForImageClassification")(config)


def _images(name: str, make: Any) -> Entry:
    return Entry("transformers", name, make, images, loss_and_logits)


ENTRIES = (
    _images("ViT", lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION))),
    Entry("transformers", "Whisper", whisper, speech, loss_and_logits),
    Entry("transformers", "wav2vec 2.0", wav2vec2, waves, loss_and_logits),
    Entry("transformers", "CLIP", clip, captioned, contrastive),
    Entry("transformers", "DETR", detr, boxed, loss_and_logits),
    Entry("transformers", "SegFormer", segformer, segmented, loss_and_logits),
    _images("ConvNeXt", lambda: convnext("ConvNext")),
    _images("ConvNeXt V2", lambda: convnext("ConvNextV2")),
    _images(
        "ResNet",
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], num_labels=4)
        ),
    ),
    _images(
        "Swin",
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(
                image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=4
            )
        ),
    ),
    _images(
        "MobileNetV2",
        lambda: hf.MobileNetV2ForImageClassification(
            hf.MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=4)
        ),
    ),
    _images(
        "RegNet",
        lambda: hf.RegNetForImageClassification(
            hf.RegNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8, num_labels=4)
        ),
    ),
    _images("DeiT", lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**VISION))),
    _images("BEiT", lambda: hf.BeitForImageClassification(hf.BeitConfig(**VISION))),
    _images("DINOv2", lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**VISION))),
)
