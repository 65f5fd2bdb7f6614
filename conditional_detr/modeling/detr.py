"""DETR (Carion et al., ECCV 2020, arXiv 2005.12872): the baseline of Conditional DETR."""

from torch import Tensor

from conditional_detr.modeling.config import Config
from conditional_detr.modeling.detection_transformer import DetectionTransformer, Output
from conditional_detr.modeling.detr_decoder import DETRDecoder
from conditional_detr.modeling.metadata import Metadata
from conditional_detr.modeling.scores import SoftmaxScores


class DETR(DetectionTransformer):
    """DETR: cross-attention to sums of content and position, boxes without reference points, a softmax over classes.

    The class head has C + 1 rows, the last one for "no object". The attributes are those of
    :class:`~conditional_detr.modeling.detection_transformer.DetectionTransformer`.

    Args:
        config: the sizes; default: those of the published checkpoint, with 100 queries. The defaults of Config are
            ConditionalDETR's, with 300: ``replace(DETR.default_config, num_classes=3)`` changes only the classes.
        metadata: class names, category ids and preprocessing; default: numbered classes, the paper's preprocessing.

    Raises:
        TypeError: ``config`` is not a Config.
        ValueError: timm has no such backbone or stage, or the number of class names differs from ``num_classes``.
    """

    architecture = "detr"
    default_config = Config(num_queries=100)
    scores = SoftmaxScores()

    def __init__(self, config: Config | None = None, metadata: Metadata | None = None) -> None:
        super().__init__(config, metadata, decoder=DETRDecoder)

    def predict(self, f: Tensor) -> Output:
        """Predict classes and boxes from decoder states: b = sigmoid(FFN(f)) (DETR paper, section 3.2).

        Args:
            f: (L, B, N, D), decoder states.

        Returns:
            Output of logits (L, B, N, C + 1) and boxes (L, B, N, 4).
        """
        return Output(self.class_head(f), self.box_head(f).sigmoid())
