"""What the model looks at: occlusion, LIME, Grad-CAM, attention rollout and activations, as pictures with a check of their
faithfulness; of images, texts and sensor series.

Occlusion and LIME need only the runtime, so they explain the very graph that ships. PyTorch loads for Grad-CAM and rollout
alone.
"""

from .explain import METHODS, RECORD, explain

__all__ = ["METHODS", "RECORD", "explain"]
