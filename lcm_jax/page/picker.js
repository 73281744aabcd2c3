// The image that a visitor chooses, and the mask drawn over it. Its value is "IMAGE MASK", two data URIs, or "".
const find = (name) => element.querySelector(name);
const [file, drop, board, tools, said] = [".file", ".drop", ".board", ".tools", ".said"].map(find);
const [image, mask, brush] = [".image", ".mask", ".brush"].map(find);
const { width, height, largest } = props;
const ink = mask.getContext("2d");
let empty = true, last = null;

function show(uri) {
  ink.clearRect(0, 0, width, height);
  empty = true;
  drop.hidden = Boolean(uri);
  board.hidden = tools.hidden = !uri;
  if (!uri) return;
  image.src = find(".save-image").href = uri;
  find(".save-mask").hidden = find(".clear").disabled = true;
}

function maskUri() {
  const whole = document.createElement("canvas");
  [whole.width, whole.height] = [width, height];
  const context = whole.getContext("2d");
  context.fillRect(0, 0, width, height);
  context.drawImage(mask, 0, 0);
  return whole.toDataURL("image/png");
}

function tell() {
  const drawn = empty ? "" : maskUri();
  find(".save-mask").hidden = find(".clear").disabled = empty;
  find(".save-mask").href = drawn;
  props.value = `${props.value.split(" ")[0]} ${drawn}`.trim();
  trigger("input");
}

function choose(chosen) {
  if (!chosen) return;
  const large = chosen.size > largest;
  said.textContent = large ? `${chosen.name} has ${Math.ceil(chosen.size / 2 ** 20)} MiB; at most ${largest / 2 ** 20}` : "";
  if (large) return;
  const reader = new FileReader();
  reader.onload = () => {
    props.value = reader.result.startsWith("data:") ? reader.result : "";
    trigger("upload");
  };
  reader.readAsDataURL(chosen);
}

function point(event) {
  const box = mask.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
}

function stroke(to) {
  ink.strokeStyle = "white";
  ink.lineCap = ink.lineJoin = "round";
  ink.lineWidth = (brush.value / 100) * Math.max(width, height);
  ink.beginPath();
  ink.moveTo(...last);
  ink.lineTo(...to);
  ink.stroke();
  [last, empty] = [to, false];
}

[mask.width, mask.height] = [width, height];
show("");
file.addEventListener("change", () => { choose(file.files[0]); file.value = ""; });
element.addEventListener("dragover", (event) => event.preventDefault());
element.addEventListener("drop", (event) => { event.preventDefault(); choose(event.dataTransfer.files[0]); });
mask.addEventListener("pointerdown", (event) => {
  mask.setPointerCapture(event.pointerId);
  last = point(event);
  stroke(last);
});
mask.addEventListener("pointermove", (event) => { if (last) stroke(point(event)); });
for (const end of ["pointerup", "pointercancel"]) mask.addEventListener(end, () => { if (last) { last = null; tell(); } });
find(".clear").addEventListener("click", () => { show(props.value.split(" ")[0]); tell(); });
find(".remove").addEventListener("click", () => { props.value = ""; show(""); trigger("input"); });
watch("value", () => { if (!props.value.includes(" ")) show(props.value); });
