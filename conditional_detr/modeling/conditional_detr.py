"""Conditional DETR (Meng et al., ICCV 2021, arXiv 2108.06152)."""

import torch.nn.functional as F
from torch import Tensor, nn

from conditional_detr.modeling.config import Config
from conditional_detr.modeling.decoder import Decoder
from conditional_detr.modeling.detection_transformer import DetectionTransformer, Output
from conditional_detr.modeling.metadata import Metadata
from conditional_detr.modeling.scores import SigmoidScores


class ConditionalDETR(DetectionTransformer):
    """Conditional DETR: conditional cross-attention, boxes relative to reference points, a sigmoid for each class.

    The attributes are those of :class:`~conditional_detr.modeling.detection_transformer.DetectionTransformer`.

    Args:
        config: the sizes; default: those of the published checkpoint.
        metadata: class names, category ids and preprocessing; default: numbered classes, the paper's preprocessing.

    Raises:
        TypeError: ``config`` is not a Config.
        ValueError: timm has no such backbone or stage, or the number of class names differs from ``num_classes``.
    """

    architecture = "conditional_detr"
    default_config = Config()
    scores = SigmoidScores()

    def __init__(self, config: Config | None = None, metadata: Metadata | None = None) -> None:
        super().__init__(config, metadata, decoder=Decoder)
        for parameter in self.box_head.layers[-1].parameters():  # boxes start at the reference points
            nn.init.zeros_(parameter)

    def predict(self, f: Tensor, s: Tensor) -> Output:
        """Predict classes and boxes from decoder states: b = sigmoid(FFN(f) + [s, 0, 0]) (paper, section 3.2).

        Args:
            f: (L, B, N, D), decoder states.
            s: (B, N, 2), reference points before the sigmoid.

        Returns:
            Output of logits (L, B, N, C) and boxes (L, B, N, 4).
        """
        boxes = (self.box_head(f) + F.pad(s, (0, 2))).sigmoid()
        return Output(self.class_head(f), boxes)
