// Drives NiiVue (globalThis.niivue) with the volumes that lie in this page.
const settings = JSON.parse(document.getElementById("viewer-settings").textContent);
const element = (name) => document.getElementById(`viewer-${name}`);
const status = element("status");
const OPACITY = { image: 1, reference: 0, prediction: 0.6, difference: 0 };
const { Niivue, NVImage } = globalThis.niivue;
let viewer = null;
let shown = null;

async function start() {
  viewer = new Niivue({
    dragAndDropEnabled: false, isRadiologicalConvention: true, isNearestInterpolation: true, backColor: [0, 0, 0, 1],
    multiplanarShowRender: 1, show3Dcrosshair: true, crosshairWidth: 0.6, crosshairWidthUnit: "percent",
    crosshairColor: [1, 1, 1, 0.5], logLevel: "error",
  });
  await viewer.attachToCanvas(element("canvas"));
}

async function volumeOf(number, position, layer) {
  const colors = settings.colors[layer];
  const volume = await NVImage.loadFromBase64({
    base64: document.getElementById(`volume-${number}-${position}`).textContent,
    name: `${layer}.nii.gz`,
    colormap: layer === "image" || colors ? "gray" : "viridis",
    opacity: OPACITY[layer] ?? 0,
    cal_min: 0,
    cal_max: 255,
  });
  if (colors) volume.setColormapLabel(colors);
  return volume;
}

function addSlider(layer, position) {
  const label = document.createElement("label");
  const slider = document.createElement("input");
  Object.assign(slider, { type: "range", min: 0, max: 1, step: 0.05, value: OPACITY[layer] ?? 0 });
  slider.addEventListener("input", () => viewer.setOpacity(position, Number(slider.value)));
  label.append(`${layer} `, slider);
  element("layers").append(label);
}

async function show(number) {
  const current = settings.cases[number];
  shown = number;
  status.textContent = `Loading ${current.name} ...`;
  try {
    if (viewer === null) await start();
    for (const volume of [...viewer.volumes].reverse()) viewer.removeVolume(volume);
    element("layers").replaceChildren();
    for (const [position, layer] of current.layers.entries()) {
      viewer.addVolume(await volumeOf(number, position, layer));
      addSlider(layer, position);
    }
    setLayout();
    viewer.scene.crosshairPos = current.center;
    viewer.drawScene();
    status.textContent = `${current.name} (${current.reason}). ${current.remark ? `Changed for this view: ${current.remark}.` : ""}`;
    element("canvas").dataset.case = current.name;
  } catch (error) {
    status.textContent = `The viewer does not run in this browser (${error.message}); it needs WebGL 2. The slices above need nothing.`;
  }
}

function setLayout() {
  const layouts = {
    multiplanar: viewer.sliceTypeMultiplanar, axial: viewer.sliceTypeAxial, coronal: viewer.sliceTypeCoronal,
    sagittal: viewer.sliceTypeSagittal, render: viewer.sliceTypeRender,
  };
  viewer.setSliceType(layouts[element("layout").value]);
}

element("case").addEventListener("change", () => show(Number(element("case").value)));
element("layout").addEventListener("change", () => viewer && setLayout());
element("outline").addEventListener("change", () => viewer?.setAtlasOutline(element("outline").checked ? 1 : 0));
for (const button of document.querySelectorAll(".open-viewer")) {
  button.addEventListener("click", () => {
    element("case").value = button.dataset.case;
    document.getElementById("viewer").scrollIntoView();
    show(Number(button.dataset.case));
  });
}
new IntersectionObserver((entries, observer) => {
  if (!entries.some((entry) => entry.isIntersecting)) return;
  observer.disconnect();
  if (shown === null) show(0);
}).observe(element("frame"));
