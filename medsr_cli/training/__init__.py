"""Fine-tuning: packed slices, patches, the loop, and the model card. torch and the rooms below."""
