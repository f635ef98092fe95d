"""Models that work in latent vectors. Importing the package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache_latentforge import LatentForgeCache
from .configuration_autoencoder import LatentForgeAutoencoderConfig
from .configuration_idea import LatentForgeIdeaConfig
from .configuration_latentforge import LatentForgeConfig, LatentHeadConfig
from .configuration_wire import LatentForgeWireConfig
from .latent_packet import Packet
from .latent_receiver import Receiver, Template
from .modeling_autoencoder import LatentForgeAutoencoder
from .modeling_idea import LatentForgeIdea
from .modeling_latentforge import LatentForgeForCausalLM, LatentForgeModel
from .modeling_wire import LatentForgeWire


AutoConfig.register("latentforge_autoencoder", LatentForgeAutoencoderConfig, exist_ok=True)
AutoConfig.register("latentforge", LatentForgeConfig, exist_ok=True)
AutoConfig.register("latentforge_wire", LatentForgeWireConfig, exist_ok=True)
AutoConfig.register("latentforge_idea", LatentForgeIdeaConfig, exist_ok=True)
AutoModel.register(LatentForgeAutoencoderConfig, LatentForgeAutoencoder, exist_ok=True)
AutoModel.register(LatentForgeConfig, LatentForgeForCausalLM, exist_ok=True)
AutoModel.register(LatentForgeWireConfig, LatentForgeWire, exist_ok=True)
AutoModel.register(LatentForgeIdeaConfig, LatentForgeIdea, exist_ok=True)
AutoModelForCausalLM.register(LatentForgeConfig, LatentForgeForCausalLM, exist_ok=True)

# saved checkpoints carry these files, so that `trust_remote_code=True` loads them where this package is not installed
LatentForgeAutoencoderConfig.register_for_auto_class()
LatentForgeConfig.register_for_auto_class()
LatentForgeWireConfig.register_for_auto_class()
LatentForgeIdeaConfig.register_for_auto_class()
LatentForgeAutoencoder.register_for_auto_class("AutoModel")
LatentForgeWire.register_for_auto_class("AutoModel")
LatentForgeIdea.register_for_auto_class("AutoModel")
LatentForgeForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "LatentForgeAutoencoder",
    "LatentForgeAutoencoderConfig",
    "LatentForgeCache",
    "LatentForgeConfig",
    "LatentForgeForCausalLM",
    "LatentForgeIdea",
    "LatentForgeIdeaConfig",
    "LatentForgeModel",
    "LatentForgeWire",
    "LatentForgeWireConfig",
    "LatentHeadConfig",
    "Packet",
    "Receiver",
    "Template",
]
