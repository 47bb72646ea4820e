"""Special token ids, kinds of position, and nothing else: the words every later room shares."""

from __future__ import annotations

from enum import IntEnum


class Special(IntEnum):
    """Ids 0..15 of every vocabulary. PAD is 0, the id that Baidu's published MoE modules never route."""

    PAD = 0
    BOS = 1  # begins a document
    EOS = 2  # ends a document, and a text answer
    BOI = 3  # begins an image
    EOI = 4
    BOV = 5  # begins a video
    EOV = 6
    BOA = 7  # begins audio
    EOA = 8
    SEP = 9  # after an understanding image, video or audio (the report's Figure 2 has it after an image)
    VISION = 10  # placeholder: an accumulated scale feature stands here (generation)
    PATCH = 11  # placeholder: a merged CNN+ViT feature stands here (understanding)
    AUDIO = 12  # placeholder: a frame of audio codes stands here
    SPEAKER = 13  # placeholder: a speaker embedding stands here
    RESERVED_0 = 14
    RESERVED_1 = 15


NUM_SPECIALS = len(Special)
IGNORE = -100  # label value that carries no loss
NO_CODE = -1  # audio_codes value where no audio frame stands


class Kind(IntEnum):
    """What a position belongs to; for heads, losses' bookkeeping and pictures. The router never sees it."""

    PAD = 0
    TEXT = 1
    IMAGE_UND = 2
    VIDEO_UND = 3
    AUDIO_UND = 4
    IMAGE_GEN = 5
    VIDEO_GEN = 6
    AUDIO_GEN = 7


MODALITIES = ("text", "image", "video", "audio")
