"""Base models, LoRA factors, the MetaTuner networks and the offline tiny model."""
