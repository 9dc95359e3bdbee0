"""The networks of image models.

| file | holds |
| --- | --- |
| configs | what a model is made of, and the papers' six models |
| layers | gated and masked layers, trunks of encoders |
| encoders | separate and shifted components, one or two levels |
| decoders | Bernoulli pixels, PixelCNN |
| priors | pseudo-images, the lower level given the upper one |
| vae | ImageVAE, composed of these and of the core's flow |
"""
