"""Models of Hugging Face Transformers under a plan: `attn_implementation="heteromesh"`.

    heteromesh.parallel.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="heteromesh")

Inside a pass attention follows the pass's method and the mask that the model asks for; elsewhere (evaluation,
generation) it is Transformers' own. Positions come with the pass, so a model needs no change. Checkpoints are the
model's own: `save_pretrained`.
"""

from heteromesh.parallel.transformers.interface import NAME as NAME
from heteromesh.parallel.transformers.interface import register as register
