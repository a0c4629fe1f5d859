// The nodes that train: they share settings, presets and buttons.

const TRAINING_NODES = ["DMMDistillTeachers", "DMMAddTeacher", "DMMForgetStyle", "DMMFewStep"];

export const trains = (node) => TRAINING_NODES.includes(node.comfyClass);
