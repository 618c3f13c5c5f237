"""What the model looks at: occlusion, LIME, Grad-CAM and activations, as pictures with a check of their faithfulness.

Occlusion and LIME need only the runtime, so they explain the very graph that ships. PyTorch loads for Grad-CAM alone.
"""

from .explain import METHODS, RECORD, explain

__all__ = ["METHODS", "RECORD", "explain"]
