"""What the methods of `ClusterConfig.method` do, set in the one place that knows all rooms.

A method is one object, `runtime.quantization_methods.METHODS[name]`: defaults and names are there, the functions that
make models come from here.
"""

from ..runtime.quantization_methods import METHODS
from .codebooks.cluster import fit_clusters
from .codebooks.uniform import fit_uniform
from .ptq.gptq import refit_codebook, refit_step
from .qat.cluster import ClusterFakeQuantize
from .qat.uniform import UniformFakeQuantize

METHODS["cluster"].implement(fit=fit_clusters, refit=refit_codebook, fake_quantizer=ClusterFakeQuantize)
METHODS["uniform"].implement(fit=fit_uniform, refit=refit_step, fake_quantizer=UniformFakeQuantize)
