// Colours of PC-Talk's sockets and links, so that a graph can be read at a glance.

import { app } from "../../../scripts/app.js";

const COLORS = {
  PCTALK_MOTION_MODEL: "#9575cd",
  PCTALK_RENDERER: "#7986cb",
  PCTALK_PORTRAIT: "#f48fb1",
  PCTALK_KEYPOINTS: "#ffb74d",
  PCTALK_SPEECH: "#4db6ac",
  PCTALK_DEFORMATION: "#aed581",
};

function paint() {
  for (const [type, color] of Object.entries(COLORS)) {
    app.canvas.default_connection_color_byType[type] = color;
    app.canvas.constructor.link_type_colors[type] = color;
    document.documentElement.style.setProperty(`--color-datatype-${type}`, color);
  }
  app.canvas.setDirty(true, true);
}

app.registerExtension({
  name: "PCTalk.SocketColors",
  setup() {
    paint();
    // Loading a palette blanks the types that it doesn't know; it does so after this event.
    app.ui.settings.addEventListener("Comfy.ColorPalette.change", () => setTimeout(paint));
  },
  afterConfigureGraph: paint,
});
