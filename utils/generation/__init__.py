"""From class names to images: prompts, the pipeline, latents to pixels, and what is left to draw."""
