"""Names of ImageNet and of its layout; imports nothing, since plans and messages need them too."""

IMAGENET = "ImageNet-1k val"
LAYOUT = "ImageFolder layout is expected: <folder>/train/<class>/<image> and <folder>/val/<class>/<image>"
